"""Two real machines whose connection is cut in the hand-over or after it: both keep what they have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.relay import CutAt, Cutter, Relay, at_byte, before, passes
from tests.support.requires import requires
from vmm.errors import MachineError
from vmm.migration import commands
from vmm.migration.errors import MigrationRefused
from vmm.migration.return_path import Loaded, MessageWriter, Shut, Started
from vmm.migration.stream import encode
from vmm.ram import PageNotReceived
from vmm.run_state import RunState

GUEST = "pages=512 beat=16"


@contextlib.contextmanager
def relay_to(
    machines: Sides, target: str, name: str = "relay", *, forward: CutAt = passes, back: CutAt = passes
) -> Iterator[tuple[Relay, str]]:
    """A stranger in the middle, on the way to the socket `target`; gives it and the way through it."""
    cutters = Cutter(forward), Cutter(back)
    relay = Relay(f"{machines.folder}/{name}", target.removeprefix("unix:"), *cutters)
    for cutter in cutters:
        cutter.relay = relay
    try:
        yield relay, f"unix:{machines.folder}/{name}"
    finally:
        relay.close()


def slowly(source: Side) -> None:
    source.migrator.set_parameters({"max-bandwidth": 1, "max-postcopy-bandwidth": 1, "downtime-limit": 0})


def fast(source: Side) -> None:
    source.migrator.set_parameters({"max-bandwidth": 0, "max-postcopy-bandwidth": 0})


def to_postcopy(source: Side, destination: Side, uri: str) -> None:
    """The guest runs at the destination, and has asked for a page at least."""
    slowly(source)
    source.migrator.migrate(uri)
    source.wait("active")
    source.migrator.start_postcopy()
    destination.wait_event("POSTCOPY_STATE", "running")
    until(lambda: source.migrator.query()["x-postcopy"]["requested-pages"], "a request")


def marks(*sides: Side) -> tuple[int, ...]:
    return tuple(len(side.events) for side in sides)


def both(status: str, source: Side, destination: Side, since: tuple[int, ...] = (0, 0)) -> None:
    source.wait(status, since=since[0])
    destination.wait(status, since=since[1])


def recover(source: Side, destination: Side, uri: str) -> None:
    """As management code does it. The destination may not have noticed yet that it is paused."""

    def accepted() -> bool:
        try:
            destination.migrator.recover(uri)
        except MigrationRefused:
            return False
        return True

    until(accepted, "migrate-recover")
    source.migrator.migrate(uri, resume=True)


def check_moved(source: Side, destination: Side) -> None:
    """All of it is there, and lives."""
    until(lambda: not destination.migrator.has_missing_pages, "the last page")
    assert source.machine.run_state is RunState.POSTMIGRATE
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def check_lives_at_source(source: Side, destination: Side) -> None:
    assert destination.machine.run_state is RunState.INMIGRATE
    assert destination.serial.text == ""
    assert source.machine.run_state is RunState.RUNNING
    source.wait_heartbeat(2)
    assert source.verdict().is_good, source.verdict()


def statuses(side: Side, since: int) -> list[str]:
    return [value for name, value in side.events[since:] if name == "MIGRATION"]


def test_a_cut_and_recovery(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    with relay_to(machines, machines.uri) as (relay, uri):
        to_postcopy(source, destination, uri)
        relay.cut()
        both("postcopy-paused", source, destination)
    until(lambda: destination.migrator.query()["x-missing"]["waited-for"], "the guest needs a missing page")
    shown = destination.migrator.query()
    assert shown["error-desc"]
    assert shown["x-missing"]["pages"] > shown["x-missing"]["waited-for"]
    assert "migrate-recover" in shown["x-next"][0]
    assert "migrate-recover" in source.migrator.query()["x-next"][0]
    since = marks(source, destination)
    fast(source)
    recover(source, destination, machines.uri + "2")
    both("completed", source, destination, since)
    assert statuses(source, since[0]) == ["postcopy-recover", "postcopy-active", "completed"]
    assert statuses(destination, since[1]) == ["setup", "postcopy-recover", "postcopy-active", "completed"]
    check_moved(source, destination)


def test_every_page_of_a_guest_that_does_not_run(machines: Sides) -> None:
    """What was on the wire when it broke is sent again, and nothing else is changed."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST, paused=True)
    source.wait_heartbeat()
    slowly(source)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 2 * MIB})
    with relay_to(machines, machines.uri, forward=at_byte(MIB + 1234)) as (_, uri):
        source.migrator.migrate(uri)
        source.migrator.start_postcopy()
        both("postcopy-paused", source, destination)
    since = marks(source, destination)
    fast(source)
    recover(source, destination, machines.uri + "2")
    both("completed", source, destination, since)
    for ours, theirs in zip(source.machine.ram.blocks, destination.machine.ram.blocks, strict=True):
        for page in range(ours.page_count):
            assert ours.read(page * PAGE, PAGE) == theirs.read(page * PAGE, PAGE), hex(page * PAGE)
    destination.machine.cont()
    check_moved(source, destination)


def test_ten_cuts(machines: Sides) -> None:
    """By migrate-pause, on either side in turn, in one migration."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    to_postcopy(source, destination, machines.uri)
    for number in range(10):
        since = marks(source, destination)
        (source, destination)[number % 2].migrator.pause()
        both("postcopy-paused", source, destination, since)
        since = marks(source, destination)
        recover(source, destination, f"{machines.uri}{number}")
        both("postcopy-active", source, destination, since)
    since = marks(source, destination)
    fast(source)
    both("completed", source, destination, since)
    check_moved(source, destination)


def test_a_source_that_ends_too_early(machines: Sides) -> None:
    """It has forgotten a page; that is a pause with a reason, and recovery finds the page."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST, fault="drop-request")
    source.wait_heartbeat()
    slowly(source)
    source.migrator.migrate(machines.uri)
    source.wait("active")
    source.migrator.start_postcopy()
    until(lambda: source.migrator.query().get("ram", {}).get("postcopy-requests"), "a request")
    fast(source)
    both("postcopy-paused", source, destination)
    assert destination.error == "The migration ended but pages are missing: 1 of RAMBlock 'microvm.ram'"
    assert destination.migrator.query()["x-missing"] == {"pages": 1, "waited-for": 1}
    since = marks(source, destination)
    recover(source, destination, machines.uri + "2")
    both("completed", source, destination, since)
    check_moved(source, destination)


# ---- the second cut comes in the middle of the handshake ----

HANDSHAKE = (commands.Ask(bytes(16)), commands.RecvBitmap("microvm.ram"), commands.PostcopyResume())
FORWARD_BYTES = sum(len(encode(record)) for record in HANDSHAKE)
BACK_BYTES = 8 + (4 + 12 + 8 + 16 * MIB // PAGE // 8 + 8) + 8
"""X_FATE, RECV_BITMAP with its map, RESUME_ACK."""


@pytest.mark.parametrize(("way", "length"), [("forward", FORWARD_BYTES), ("back", BACK_BYTES)])
def test_the_handshake_is_cut(machines: Sides, way: str, length: int) -> None:
    """One migration, and as many attempts as the handshake has bytes; of the bitmap's only some."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    to_postcopy(source, destination, machines.uri)
    source.migrator.pause()
    both("postcopy-paused", source, destination)
    for point in (n for n in range(length) if n < 40 or n > length - 20 or n % 64 == 0):
        target, since = f"{machines.uri}-{point}", len(source.events)
        cut = {"forward": passes, "back": passes, way: at_byte(point)}
        with relay_to(machines, target, f"r{point}", forward=cut["forward"], back=cut["back"]) as (
            _,
            through,
        ):

            def accepted(target: str = target) -> bool:
                with contextlib.suppress(MigrationRefused):
                    destination.migrator.recover(target)
                    return True
                return False

            until(accepted, "migrate-recover")
            source.migrator.migrate(through, resume=True)
            source.wait("postcopy-paused", since=since)
        assert source.machine.run_state is RunState.FINISH_MIGRATE
    until(lambda: destination.status == "postcopy-paused", "the destination's pause")
    assert destination.migrator.query()["x-missing"]["pages"] > 0
    since_last = marks(source, destination)
    fast(source)
    recover(source, destination, machines.uri + "-last")
    both("completed", source, destination, since_last)
    check_moved(source, destination)


# ---- cut in the hand-over: who has the guest is asked ----

START = encode(commands.Start())
LOADED, STARTED, SHUT = (MessageWriter().write(message) for message in (Loaded(), Started(), Shut(0)))
BY = pytest.mark.parametrize("by", ["precopy", "postcopy"])


def hand_over(
    machines: Sides, by: str, *, forward: CutAt = passes, back: CutAt = passes
) -> tuple[Side, Side]:
    """Migrate through a relay that cuts; returns when the source has noticed."""
    if by == "postcopy":
        requires("uffd")
    make = machines.postcopy_pair if by == "postcopy" else machines.pair
    source, destination = make(append=GUEST)
    source.wait_heartbeat()
    with relay_to(machines, machines.uri, forward=forward, back=back) as (_, uri):
        if by == "postcopy":
            source.migrator.set_parameters({"max-bandwidth": 1, "downtime-limit": 0})
        source.migrator.migrate(uri)
        if by == "postcopy":
            source.migrator.start_postcopy()
        source.wait("postcopy-paused", "failed", "completed")
    return source, destination


@BY
def test_cut_before_the_destination_can_say_that_it_has_loaded(machines: Sides, by: str) -> None:
    """Nothing was handed over."""
    source, destination = hand_over(machines, by, back=before(LOADED))
    assert source.status == "failed"
    destination.wait("failed")
    check_lives_at_source(source, destination)


@BY
@pytest.mark.parametrize("anew", [True, False], ids=["new address", "same address"])
def test_cut_before_the_order_to_start_comes(machines: Sides, by: str, anew: bool) -> None:
    """Both stand still; asked, the destination says that it did not start, and the source goes on."""
    source, destination = hand_over(machines, by, forward=before(START))
    assert source.status == "postcopy-paused"
    destination.wait("failed")
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    assert destination.machine.run_state is RunState.INMIGRATE
    since = marks(source, destination)
    if anew:
        recover(source, destination, machines.uri + "2")
    else:
        source.migrator.migrate(machines.uri, resume=True)
    source.wait("failed", since=since[0])
    assert source.error == "The destination did not start the guest, so it stays here"
    check_lives_at_source(source, destination)
    since = marks(source, destination)
    fast(source)
    source.migrator.migrate(machines.uri)
    both("completed", source, destination, since)
    check_moved(source, destination)


@BY
@pytest.mark.parametrize("lost", [STARTED, SHUT], ids=["STARTED", "SHUT"])
def test_cut_before_the_source_hears_that_it_has_started(machines: Sides, by: str, lost: bytes) -> None:
    """The destination has it, or runs it; the source is paused until it is told so."""
    source, destination = hand_over(machines, by, back=before(lost))
    assert source.status == "postcopy-paused"
    destination.wait("completed", "postcopy-paused")
    with pytest.raises(MachineError, match="x-migrate-take-back"):
        source.machine.cont()
    with pytest.raises(MigrationRefused, match="cannot cancel"):
        source.migrator.cancel()
    since = marks(source, destination)
    fast(source)
    recover(source, destination, machines.uri + "2")
    source.wait("completed", since=since[0])
    check_moved(source, destination)


def test_another_process_does_not_know_what_became_of_it(machines: Sides) -> None:
    """It may have run in the one that is gone: the source stays paused, until a user decides."""
    source, destination = hand_over(machines, "precopy", forward=before(START))
    other = machines.make(append=GUEST, incoming=True)
    other.migrator.incoming(machines.uri + "-other")
    since = len(source.events)
    source.migrator.migrate(machines.uri + "-other", resume=True)
    source.wait("postcopy-paused", since=since)
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    assert "does not know this guest" in source.error
    since = len(source.events)
    source.migrator.take_back()
    source.wait("failed", since=since)
    assert source.error == "Taken back: what the guest did at the destination is lost. 'cont' runs it here"
    source.machine.cont()
    check_lives_at_source(source, destination)


# ---- faults are served no more ----


def test_the_fault_loop_dies(machines: Sides) -> None:
    """The guest is stopped with the reason: it would only hang. Its missing pages stay missing."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    to_postcopy(source, destination, machines.uri)
    listener = destination.destination.attempt.listener
    kept = os.dup(listener._uffd.fd)
    try:
        unreadable = os.open("/dev/null", os.O_WRONLY)
        os.dup2(unreadable, listener._uffd.fd)
        os.close(unreadable)
        destination.migrator.pause()
        destination.wait("postcopy-paused")
        until(lambda: destination.machine.run_state is RunState.INTERNAL_ERROR, "internal-error")
        block = destination.machine.ram.blocks[0]
        maps = listener._loader.receiver.blocks.maps
        absent = maps["received"][block.name].find_next_clear(0)
        assert absent is not None
        for name in ("received", "zero"):  # as a page of zeroes that nobody has touched
            maps[name][block.name].set_range(absent, 1)
        with pytest.raises(PageNotReceived):  # and no wait for who serves no more
            block.read(absent * PAGE, PAGE)
        for name in ("received", "zero"):
            maps[name][block.name].clear_range(absent, 1)
        assert destination.error == "Unable to receive pages: Bad file descriptor"
        with pytest.raises(MachineError):
            destination.machine.cont()
        with pytest.raises(OSError, match="Bad file descriptor"):
            listener.join(10)
        listener.error = None
        assert destination.migrator.has_missing_pages
    finally:
        os.dup2(kept, listener._uffd.fd)
        os.close(kept)
