"""Mappings that are closed, and userfaultfds whose ranges are unregistered, whatever the test did."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from uffd import Features, Mapping, MappingKind, Userfaultfd


@pytest.fixture(params=MappingKind, ids=lambda kind: kind.name.lower())
def kind(request: pytest.FixtureRequest) -> MappingKind:
    value: MappingKind = request.param
    return value


@pytest.fixture
def new_mapping() -> Iterator[Callable[[int, MappingKind], Mapping]]:
    made = []

    def new(pages: int, kind: MappingKind) -> Mapping:
        made.append(Mapping(pages * 4096, kind))
        return made[-1]

    yield new
    for mapping in made:
        mapping.close()


@pytest.fixture
def new_userfaultfd() -> Iterator[Callable[[Features], Userfaultfd]]:
    made = []

    def new(features: Features) -> Userfaultfd:
        made.append(Userfaultfd(features))
        return made[-1]

    yield new
    for userfaultfd in made:
        for address, length in list(userfaultfd.registered):
            userfaultfd.unregister(address, length)  # wakes whoever a failed test left waiting
        userfaultfd.close()
