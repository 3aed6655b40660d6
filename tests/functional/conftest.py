"""Fixtures of the functional tests, by the machines' stage of life."""

from __future__ import annotations

import asyncio
import os
import pathlib
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.functional.harness import Stable
from tests.functional.linux import Saved
from tests.support.requires import requires


def children() -> dict[int, str]:
    """Process id and command of every child of this process that still runs."""
    found = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent, state = (fields := stat.read_text().rpartition(")")[2].split())[1], fields[0]
            command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            found[int(stat.parent.name)] = command
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail the run if a test of this directory left a process."""
    before = children()
    yield
    left = {pid: command for pid, command in children().items() if pid not in before}
    assert not left, f"Tests left processes: {left}"


@pytest_asyncio.fixture
async def stable() -> AsyncIterator[Stable]:
    """Starts machines; when the test is over, none is left, whatever happened."""
    async with Stable() as machines:
        yield machines


@pytest.fixture(scope="session")
def saved_linux(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A Debian kernel at its shell, to be started from there."""
    requires("linux")
    return asyncio.run(Saved.boot(tmp_path_factory.mktemp("linux")))
