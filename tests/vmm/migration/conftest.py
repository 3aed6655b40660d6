"""Fixtures of the migration tests that use real machines."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.support.real_machines import Sides


@pytest.fixture
def machines(tmp_path: pathlib.Path) -> Iterator[Sides]:
    """Makes machines; when the test is over, every thread of theirs has ended."""
    made = Sides(tmp_path)
    yield made
    made.close()
