"""Two real machines whose connection is cut after the hand-over: both keep what they have, and go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.relay import Relay
from tests.support.requires import requires
from vmm.migration.errors import MigrationRefused
from vmm.run_state import RunState

GUEST = "pages=512 beat=16"


@contextlib.contextmanager
def relay_to(machines: Sides, target: str, name: str = "relay") -> Iterator[tuple[Relay, str]]:
    """A stranger in the middle, on the way to the socket `target`; gives it and the way through it."""
    relay = Relay(f"{machines.folder}/{name}", target.removeprefix("unix:"))
    try:
        yield relay, f"unix:{machines.folder}/{name}"
    finally:
        relay.close()


def slowly(source: Side) -> None:
    source.migrator.set_parameters({"max-bandwidth": 1, "max-postcopy-bandwidth": 1, "downtime-limit": 0})


def to_postcopy(machines: Sides, source: Side, destination: Side, uri: str) -> None:
    """The guest runs at the destination, and has asked for a page at least."""
    slowly(source)
    source.migrator.migrate(uri)
    source.wait("active")
    source.migrator.start_postcopy()
    destination.wait_event("POSTCOPY_STATE", "running")
    until(lambda: source.migrator.query()["x-postcopy"]["requested-pages"], "a request")


def both_pause(source: Side, destination: Side, since: tuple[int, ...] = (0, 0)) -> None:
    source.wait("postcopy-paused", since=since[0])
    destination.wait("postcopy-paused", since=since[1])


def both_complete(source: Side, destination: Side, since: tuple[int, ...]) -> None:
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])


def marks(*sides: Side) -> tuple[int, ...]:
    return tuple(len(side.events) for side in sides)


def recover(source: Side, destination: Side, uri: str, through: str | None = None) -> None:
    """As management code does it."""
    destination.migrator.recover(uri)
    source.migrator.migrate(through or uri, resume=True)


def check_moved(source: Side, destination: Side) -> None:
    """All of it is there, and lives; pages that the guest has not written since are the source's."""
    assert not destination.migrator.has_missing_pages
    assert source.machine.run_state is RunState.POSTMIGRATE
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def same_pages(source: Side, destination: Side) -> None:
    """For a guest that does not run there."""
    for ours, theirs in zip(source.machine.ram.blocks, destination.machine.ram.blocks, strict=True):
        for page in range(ours.page_count):
            assert ours.read(page * PAGE, PAGE) == theirs.read(page * PAGE, PAGE), hex(page * PAGE)


def test_a_cut_and_recovery(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    with relay_to(machines, machines.uri) as (relay, uri):
        to_postcopy(machines, source, destination, uri)
        relay.cut()
        both_pause(source, destination)
    since = marks(source, destination)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    recover(source, destination, machines.uri + "2")
    both_complete(source, destination, since)
    after = source.events[since[0] :], destination.events[since[1] :]
    statuses = [[v for n, v in events if n == "MIGRATION"] for events in after]
    assert statuses[0] == ["postcopy-recover", "postcopy-active", "completed"]
    assert statuses[1] == ["setup", "postcopy-recover", "postcopy-active", "completed"]
    check_moved(source, destination)


def test_ten_cuts(machines: Sides) -> None:
    """By migrate-pause, on either side in turn, in one migration."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    to_postcopy(machines, source, destination, machines.uri)
    for number in range(10):
        since = marks(source, destination)
        (source, destination)[number % 2].migrator.pause()
        both_pause(source, destination, since)
        since = marks(source, destination)
        recover(source, destination, f"{machines.uri}{number}")
        source.wait("postcopy-active", since=since[0])
        destination.wait("postcopy-active", since=since[1])
    since = marks(source, destination)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    both_complete(source, destination, since)
    check_moved(source, destination)
