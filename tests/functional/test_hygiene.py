"""After many migrations in one process, good and failed, everything is where it was.

PAGEFERRY_HYGIENE=1000 makes it a thousand. Python's search for cycles is off, since nothing of a failed
attempt may wait for it; it is on where whole machines are made and closed, which a process does once.
"""

from __future__ import annotations

import gc
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.real_machines import MIB, Side, Sides, until
from tests.support.requires import requires

MIGRATIONS = int(os.environ.get("PAGEFERRY_HYGIENE", "60"))
GROWTH_BYTES = 16 * MIB
"""Of resident memory: what the allocators keep, whatever the number of migrations."""


@pytest.fixture
def machines(tmp_path: pathlib.Path) -> Iterator[Sides]:
    made = Sides(tmp_path)
    yield made
    made.close()


@pytest.fixture
def no_cycles_are_searched() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def open_fds() -> dict[str, int]:
    """What they lead to, without numbers -> how many."""
    found: dict[str, int] = {}
    for path in pathlib.Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(path).rstrip("0123456789[]:")
        except FileNotFoundError:
            continue  # the descriptor of this listing
        found[name] = found.get(name, 0) + 1
    return found


def figures() -> dict[str, object]:
    """What must be as it was."""
    maps = pathlib.Path("/proc/self/maps").read_text()
    return {
        "fds": open_fds(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "userfaultfds": maps.count("userfaultfd"),
        "children": pathlib.Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text(),
    }


def settled() -> dict[str, object]:
    """The same twice, a moment apart: what has reported its end may still be ending."""
    before: dict[str, object] = {}
    while (now := figures()) != before:
        before = now
        time.sleep(0.05)
    return before


def mappings() -> int:
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def repeat(once: Callable[[int], None], count: int) -> None:
    """Run `once`, at first until the allocators have what they need, then `count` times, and compare."""
    for number in range(5):
        once(number)
    before, maps, resident = settled(), mappings(), resident_bytes()
    for number in range(count):
        once(number)
    until(lambda: figures() == before, f"{before}; now {figures()}")
    assert mappings() <= maps + 8
    assert resident_bytes() < resident + GROWTH_BYTES


@pytest.mark.usefixtures("no_cycles_are_searched")
def test_failed_and_cancelled_migrations_leave_nothing(machines: Sides) -> None:
    """At the source and at the destination: refused, cancelled, cut, to a command and to a file that fail."""
    source = machines.make("auditor", "pages=16 beat=16", memory=2 * MIB)
    destination = machines.make("auditor", memory=4 * MIB, incoming=True)
    destination.migrator.incoming(machines.uri)
    folder = machines.folder

    def once(number: int) -> None:
        since, theirs = len(source.events), len(destination.events)
        kind = number % 5
        if kind == 0:  # the RAM has another size
            source.migrator.migrate(machines.uri)
            destination.wait("failed", since=theirs)
        elif kind == 1:
            source.migrator.migrate(f"unix:{folder}/nobody")
        elif kind == 2:
            source.migrator.migrate("exec:cat > /dev/null; exit 1")
        elif kind == 3:
            source.migrator.migrate("file:/dev/full")
        else:
            source.migrator.set_parameters({"max-bandwidth": 1})
            source.migrator.migrate("exec:cat > /dev/null")
            source.wait("active", since=since)
            source.migrator.cancel()
        source.wait("failed", "cancelled", since=since)
        source.migrator.set_parameters({"max-bandwidth": 0})
        last = source.migrator._source
        assert last is not None
        assert last.join(10), "mig/source did not end"
        del source.events[:], destination.events[:]

    repeat(once, MIGRATIONS)


@pytest.mark.usefixtures("no_cycles_are_searched")
def test_strangers_leave_nothing(machines: Sides) -> None:
    destination = machines.make("auditor", memory=2 * MIB, incoming=True)
    destination.migrator.incoming(machines.uri)

    def once(number: int) -> None:
        since = len(destination.events)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(machines.uri.removeprefix("unix:"))
            stranger.sendall((b"GET / HTTP/1.1\r\n", b"QEVM\0\0\0\3\7\0\0\0\7microvm\2", b"")[number % 3])
            stranger.shutdown(socket.SHUT_WR)
            destination.wait("failed", since=since)
        del destination.events[:]

    repeat(once, MIGRATIONS)


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
def test_good_migrations_leave_nothing(tmp_path: pathlib.Path, way: str) -> None:
    """Two machines each time, made and closed: both sides of what went well."""
    if way == "postcopy":
        requires("uffd")

    def once(number: int) -> None:
        machines = Sides(tmp_path)
        try:
            move(machines, way)
        finally:
            machines.close()
        del machines
        gc.collect()

    repeat(once, max(MIGRATIONS // 10, 3))


def move(machines: Sides, way: str) -> None:
    """There, and the guest lives."""
    source: Side
    if way == "precopy":
        source, destination = machines.pair(append="pages=16 beat=16", memory=2 * MIB)
        source.migrator.migrate(machines.uri)
    else:
        source, destination = machines.postcopy_pair(append="pages=16 beat=16", memory=2 * MIB)
        machines.to_postcopy(source, destination)
    machines.finish(source, destination)
    destination.wait_heartbeat()
    assert destination.verdict(source).is_good, destination.verdict(source)
