"""What goes wrong between two real machines: whose the guest is then, and that both can try again."""

from __future__ import annotations

import dataclasses
import pathlib
import socket
import struct
from typing import Any
from uuid import UUID

import pytest

from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.relay import Relay
from tests.support.requires import requires
from vmm.errors import MachineError
from vmm.migration import commands, source_hand_over
from vmm.migration.errors import MigrationRefused
from vmm.migration.return_path import MessageWriter, Shut
from vmm.migration.stream import encode
from vmm.run_state import RunState
from vmm.vmstate import Description, Field, Values

SMALL = "pages=128 beat=16"


def is_registered(side: Side) -> bool:
    """Would an access to a missing page of the first RAMBlock still be noticed? The kernel's own word."""
    wanted = f"{side.machine.ram.blocks[0].host_address:x}-"
    found = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            found = line.startswith(wanted)
        elif found and line.startswith("VmFlags:"):
            return "um" in line.split()
    raise AssertionError("RAM is not in smaps")


def check_lives_here(source: Side) -> None:
    """The guest runs at the source, and goes on."""
    assert source.machine.run_state is RunState.RUNNING
    source.wait_heartbeat(2)
    assert source.verdict().is_good, source.verdict()


def check_second_try(machines: Sides, source: Side, destination: Side) -> None:
    """The same two can do it now."""
    before = len(source.events), len(destination.events)
    source.migrator.set_parameters({"max-bandwidth": 0, "max-postcopy-bandwidth": 0})
    source.migrator.migrate(machines.uri)
    source.wait("completed", since=before[0])
    destination.wait("completed", since=before[1])
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


# ---- a page is missing ----


def test_end_with_a_page_missing(machines: Sides) -> None:
    """Postcopy pauses, nothing is unregistered, and the page is missing still: not a page of zeroes."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=SMALL, fault="drop-request")
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_bandwidth=1, max_postcopy_bandwidth=1)
    until(lambda: source.migrator.query()["ram"]["postcopy-requests"], "a request")
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    destination.wait("postcopy-paused")
    source.wait("postcopy-paused")
    assert destination.error == ("The migration ended but pages are missing: 1 of RAMBlock 'microvm.ram'")
    assert destination.migrator.has_missing_pages
    assert is_registered(destination)
    missing = destination.received.find_next_clear(0)
    block = destination.machine.ram.blocks[0]
    # The kernel places a page only where there is none.
    content = source.machine.ram.read(missing * PAGE, PAGE)
    block_end = block.host_address + missing * PAGE
    placed = destination.destination.attempt.listener._uffd.copy(block_end, address_of(content), PAGE)
    assert placed == (PAGE, 0)
    # With it the guest is whole.
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    assert "POSTCOPY_STATE" in {name for name, _ in destination.events}
    assert "end" not in destination.values("POSTCOPY_STATE")


_kept: list[Any] = []


def address_of(data: bytes) -> int:
    """Where a copy of `data` lies, for good."""
    import ctypes

    _kept.append(ctypes.create_string_buffer(data, len(data)))
    return ctypes.addressof(_kept[-1])


# ---- a destination that cannot load what comes ----


class Garbled:
    """A section of the source with other contents, version or name."""

    instance_id = 0

    def __init__(self, section: Any, idstr: str | None = None, version: int | None = None, **values: Any):
        self._section = section
        self._values = values
        self.idstr = idstr or section.idstr
        description = section.description
        self.description = dataclasses.replace(description, version=version or description.version)

    def save(self) -> Values:
        return {**self._section.save(), **self._values}

    def load(self, values: Values, version: int) -> None:
        raise AssertionError("a source does not load")


class Unheard:
    """A section of a device that no destination has."""

    idstr, instance_id = "hpet", 0
    description = Description("hpet", 1, 1, (Field("counter", "uint64"),))

    def save(self) -> Values:
        return {"counter": 7}

    def load(self, values: Values, version: int) -> None:
        raise AssertionError("a source does not load")


def damage(side: Side, kind: str) -> str:
    """Have a source send one section that cannot be loaded; the destination's words for it."""
    sections = side.machine.sections()
    by_name = {section.idstr: section for section in sections}
    if kind == "contents":
        text = b"sleeping".ljust(100, b"\0")
        changed: Any = Garbled(by_name["globalstate"], size=9, runstate=text)
        words = "Unknown run state"
    elif kind == "version":
        changed = Garbled(by_name["cpu"], version=99)
        words = "99"
    else:
        changed = Unheard()
        words = "hpet"
    # A method of this one object; the others of its class are as they were.
    side.machine.sections = lambda: [  # type: ignore[method-assign]  # see above
        *(changed if section.idstr == changed.idstr else section for section in sections),
        *([changed] if kind == "unknown" else []),
    ]
    return words


@pytest.mark.parametrize("kind", ["contents", "version", "unknown"])
@pytest.mark.parametrize("way", ["precopy", "postcopy"])
def test_device_state_that_cannot_be_loaded(machines: Sides, way: str, kind: str) -> None:
    """The destination says that it did not start (SHUT 1), so the source lets its guest run on."""
    if way == "postcopy":
        requires("uffd")
        source, destination = machines.postcopy_pair(append=SMALL)
        source.migrator.set_parameters({"max-bandwidth": 1})
    else:
        source, destination = machines.pair(append=SMALL)
    source.wait_heartbeat()
    words = damage(source, kind)
    source.migrator.migrate(machines.uri)
    if way == "postcopy":
        source.migrator.start_postcopy()
    assert source.wait("failed") == "failed"
    assert source.error == "Sibling indicated error 1"
    destination.wait("failed")
    assert words in destination.error, destination.error
    assert destination.machine.run_state is RunState.INMIGRATE
    assert not is_registered(destination)
    assert not destination.migrator.has_missing_pages
    assert source.values("STOP") == [None]
    assert source.values("RESUME") == [None, None]
    check_lives_here(source)
    del source.machine.sections  # the class's own again
    check_second_try(machines, source, destination)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"memory": 8 * MIB}, "Length mismatch of RAMBlock 'microvm.ram': expected 0x1000000, got 0x800000"),
        (
            {"memory": 24 * MIB},
            "Length mismatch of RAMBlock 'microvm.ram': expected 0x1000000, got 0x1800000",
        ),
        ({"machine_type": "none"}, "Machine type of the source: expected 'microvm', got 'none'"),
    ],
)
def test_a_guest_of_another_machine(machines: Sides, theirs: dict[str, Any], words: str) -> None:
    source, destination = machines.pair(append=SMALL)
    other = machines.make(append=SMALL, **theirs)
    other.migrator.migrate(machines.uri)
    other.wait("failed")
    destination.wait("failed")
    assert words in destination.error
    check_lives_here(other)
    source.wait_heartbeat()
    check_second_try(machines, source, destination)


def test_uuids(machines: Sides) -> None:
    """Compared only with the capability, as in QEMU."""
    one, other = UUID(int=1), UUID(int=2)
    destination = machines.make(append=SMALL, incoming=True, uuid=one)
    destination.migrator.incoming(machines.uri)
    stranger = machines.make(append=SMALL, uuid=other)
    stranger.capability("validate-uuid")
    stranger.migrator.migrate(machines.uri)
    stranger.wait("failed")
    destination.wait("failed")
    assert f"UUID of the source: expected {one}, got {other.hex}" in destination.error
    check_lives_here(stranger)
    stranger.capability("validate-uuid", state=False)
    check_second_try(machines, stranger, destination)


def test_the_same_uuid(machines: Sides) -> None:
    source, destination = machines.pair(append=SMALL, uuid=UUID(int=1))
    source.capability("validate-uuid")
    source.wait_heartbeat()
    check_second_try(machines, source, destination)


# ---- streams that end too early ----


def replay(machines: Sides, destination: Side, stream: bytes, *, keep_open: bool = False) -> None:
    """Send a recorded stream, and wait until the destination has an opinion."""
    since = len(destination.events)
    with socket.socket(socket.AF_UNIX) as source:
        source.connect(machines.uri.removeprefix("unix:"))
        source.sendall(stream)
        source.shutdown(socket.SHUT_WR)
        destination.wait("failed", "completed", "postcopy-paused", since=since)


def record(machines: Sides, way: str) -> bytes:
    """All that a source sends when it moves a guest of 2 MiB."""
    source = machines.make("hello", memory=2 * MIB)
    destination = machines.make("hello", memory=2 * MIB, incoming=True)
    target = f"{machines.folder}/recorded"
    destination.migrator.incoming(f"unix:{target}")
    relay = Relay(f"{machines.folder}/relay", target)
    try:
        if way == "postcopy":
            for side in (source, destination):
                side.capability("postcopy-ram")
            source.migrator.set_parameters({"max-bandwidth": 1})
        source.migrator.migrate(f"unix:{machines.folder}/relay")
        if way == "postcopy":
            source.migrator.start_postcopy()
        source.wait("completed")
    finally:
        relay.close()
    return bytes(relay.stream)


def package_of(stream: bytes) -> tuple[int, int]:
    """Where the package begins and ends in a recorded postcopy stream."""
    header = encode(commands.Packaged(b""))
    start = stream.index(header[:-4], stream.rindex(encode(commands.Ping(2))))  # discards are between them
    (length,) = struct.unpack(">I", stream[start + len(header) - 4 : start + len(header)])
    return start, start + len(header) + length


def spread(*stretches: tuple[int, int, int]) -> list[int]:
    """Points to cut at: every `step`th byte of each stretch (first, end, step)."""
    return sorted({at for first, end, step in stretches for at in range(first, end, step)})


def test_a_precopy_stream_cut_anywhere(machines: Sides) -> None:
    """Each byte of the header, many of the pages and the device state; after all of them a whole one."""
    stream = record(machines, "precopy")
    destination = machines.make("hello", memory=2 * MIB, incoming=True)
    destination.migrator.incoming(machines.uri)
    end = stream.rindex(b"{") if stream.endswith(b"}") else len(stream)
    end = stream.index(b'{"', len(stream) - 20000) - 5  # the vmdescription may be missing
    cuts = spread(
        (0, 100, 1), (100, end - 2500, max(1, end // 40)), (end - 2500, end, 50), (end - 10, end, 1)
    )
    for cut in cuts:
        replay(machines, destination, stream[:cut])
        assert destination.status == "failed", cut
        assert destination.machine.run_state is RunState.INMIGRATE, cut
    replay(machines, destination, stream)
    assert destination.status == "completed"


def test_a_postcopy_stream_cut_before_the_hand_over(machines: Sides) -> None:
    requires("uffd")
    stream = record(machines, "postcopy")
    start, end = package_of(stream)
    destination = machines.make("hello", memory=2 * MIB, incoming=True)
    destination.capability("postcopy-ram")
    destination.migrator.incoming(machines.uri)
    # A Pageferry source hands over after it, by X_START.
    ordered = stream.index(encode(commands.Start()), end) + len(encode(commands.Start()))
    for cut in spread((start - 40, start + 20, 1), (start, end, 200), (end - 10, ordered, 1)):
        replay(machines, destination, stream[:cut])
        assert destination.status == "failed", cut
        assert not is_registered(destination), cut
    replay(machines, destination, stream)
    until(lambda: destination.status == "completed", "the end")


@pytest.mark.parametrize("place", ["right after the hand-over", "in the middle", "before EOF"])
def test_a_postcopy_stream_cut_after_the_hand_over(machines: Sides, place: str) -> None:
    """The guest may run here: nothing is forgotten, what is missing stays missing."""
    requires("uffd")
    stream = record(machines, "postcopy")
    start = encode(commands.Start())
    end = stream.index(start, package_of(stream)[1]) + len(start)
    cut = {"right after the hand-over": end, "in the middle": (end + len(stream)) // 2, "before EOF": -1}[
        place
    ]
    destination = machines.make("hello", memory=2 * MIB, incoming=True, paused=True)
    destination.capability("postcopy-ram")
    destination.migrator.incoming(machines.uri)
    replay(machines, destination, stream[:cut])
    destination.wait("postcopy-paused")
    destination.wait_event("POSTCOPY_STATE", "running")  # the package is loaded all the same
    assert is_registered(destination)
    assert destination.migrator.has_missing_pages
    until(lambda: destination.machine.run_state is not RunState.INMIGRATE, "the start of the guest")
    assert destination.machine.run_state is RunState.PAUSED


# ---- the connection breaks ----


def relayed(machines: Sides, change: Any = None) -> tuple[Relay, str]:
    path = f"{machines.folder}/relay"
    target = machines.uri.removeprefix("unix:")
    return (Relay(path, target, change) if change else Relay(path, target)), f"unix:{path}"


def test_the_wire_is_cut_in_precopy(machines: Sides) -> None:
    source, destination = machines.pair(append=SMALL)
    source.wait_heartbeat()
    relay, uri = relayed(machines)
    try:
        source.migrator.set_parameters({"max-bandwidth": MIB})
        source.migrator.migrate(uri)
        destination.wait("active")
        until(lambda: len(relay.stream) > 50000, "50000 bytes")
        relay.cut()
        source.wait("failed")
        destination.wait("failed")
    finally:
        relay.close()
    check_lives_here(source)
    check_second_try(machines, source, destination)


def test_the_wire_is_cut_in_the_package(machines: Sides) -> None:
    """Before the destination has all that it needs in order to start, the guest is the source's."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=SMALL)
    source.wait_heartbeat()
    ping, package = encode(commands.Ping(2)), encode(commands.Packaged(b""))[:-4]

    def cut_in_package(total: int, data: bytes) -> bytes:
        stream = bytes(relay.stream) + data
        start = stream.find(package, stream.find(ping))  # discards are between them
        if ping not in stream or start < 0:
            return data
        relay.cut_now = True
        return data[: start + len(package) + 100 - total]

    relay, uri = relayed(machines, cut_in_package)
    try:
        source.migrator.set_parameters({"max-bandwidth": 1})
        source.migrator.migrate(uri)
        source.migrator.start_postcopy()
        source.wait("failed")
        destination.wait("failed")
    finally:
        relay.close()
    assert destination.machine.run_state is RunState.INMIGRATE
    assert not is_registered(destination)
    check_lives_here(source)
    check_second_try(machines, source, destination)


def test_the_wire_is_cut_in_postcopy(machines: Sides) -> None:
    """Both sides pause; the destination's guest waits for a page, and the source keeps it."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=SMALL)
    source.wait_heartbeat()
    relay, uri = relayed(machines)
    try:
        source.migrator.set_parameters({"max-bandwidth": 1, "max-postcopy-bandwidth": 1})
        source.migrator.migrate(uri)
        source.wait("active")
        source.migrator.start_postcopy()
        destination.wait_event("POSTCOPY_STATE", "running")
        until(lambda: source.migrator.query()["x-postcopy"]["requested-pages"], "a request")
        relay.cut()
        source.wait("postcopy-paused")
        destination.wait("postcopy-paused")
    finally:
        relay.close()
    assert is_registered(destination)
    assert destination.migrator.has_missing_pages
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    with pytest.raises(MigrationRefused, match="There's a migration process in progress"):
        source.migrator.migrate(machines.uri)


# ---- a destination that says nothing, or too little ----


class SilentDestination:
    """Takes all that a source sends and answers with what it is told to."""

    def __init__(self, machines: Sides) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(machines.uri.removeprefix("unix:"))
        self._listener.listen(1)
        self._listener.settimeout(60)

    def take(self, source: Side) -> None:
        """Read until the source waits for our last word."""
        self._connection, _ = self._listener.accept()
        self._connection.setblocking(False)
        seen = bytearray()

        def handed_over() -> bool:
            try:
                seen.extend(self._connection.recv(1 << 20))
            except BlockingIOError:
                return b'"globalstate"' in seen and seen.endswith(b"}")
            return False

        until(handed_over, "the vmdescription")
        del source

    def say(self, message: bytes) -> None:
        self._connection.sendall(message)

    def close(self) -> None:
        self._connection.close()
        self._listener.close()


@pytest.mark.parametrize("last_word", ["nothing", "SHUT 1 of a stock QEMU"])
def test_after_the_hand_over_the_guest_never_runs_by_itself(
    machines: Sides, last_word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor can it be cancelled, nor made to run by `cont` before the user says that the other one is gone."""
    monkeypatch.setattr(source_hand_over, "INTRODUCTION_S", 0.1)
    source = machines.make(append=SMALL)
    source.wait_heartbeat()
    peer = SilentDestination(machines)
    try:
        source.migrator.migrate(machines.uri)
        peer.take(source)
        with pytest.raises(MigrationRefused, match="cannot cancel"):
            source.migrator.cancel()
        if last_word != "nothing":
            peer.say(MessageWriter().write(Shut(1)))
    finally:
        peer.close()
    source.wait("failed")
    assert "the destination may run the guest, so it stays paused here" in source.error
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert source.values("RESUME") == [None]
    with pytest.raises(MachineError, match="x-migrate-take-back allows it here"):
        source.machine.cont()
    source.migrator.take_back()
    source.machine.cont()
    check_lives_here(source)


def test_cancel_in_postcopy_is_refused(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=SMALL)
    source.wait_heartbeat()
    machines.to_postcopy(source, destination)
    with pytest.raises(MigrationRefused, match=r"^Postcopy migration in progress, cannot cancel\."):
        source.migrator.cancel()
    machines.finish(source, destination)
    source.migrator.cancel()  # nothing to do any more
    assert source.status == "completed"


# ---- pause-before-switchover ----


def paused_before_switchover(machines: Sides) -> tuple[Side, Side]:
    source, destination = machines.pair(append=SMALL)
    source.capability("pause-before-switchover")
    source.wait_heartbeat()
    source.migrator.migrate(machines.uri)
    source.wait("pre-switchover")
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    return source, destination


def test_continue_before_switchover(machines: Sides) -> None:
    source, destination = paused_before_switchover(machines)
    with pytest.raises(MigrationRefused, match="Migration not in expected state: pre-switchover"):
        source.migrator.continue_("device")
    source.migrator.continue_("pre-switchover")
    source.wait("completed")
    destination.wait("completed")
    assert source.values("MIGRATION") == ["setup", "active", "pre-switchover", "device", "completed"]
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good


def test_cancel_before_switchover(machines: Sides) -> None:
    source, destination = paused_before_switchover(machines)
    source.migrator.cancel()
    source.wait("cancelled")
    destination.wait("failed")
    check_lives_here(source)
    source.capability("pause-before-switchover", state=False)
    check_second_try(machines, source, destination)


def test_capabilities_while_migrating(machines: Sides) -> None:
    source, destination = paused_before_switchover(machines)
    for side in (source, destination):
        with pytest.raises(MigrationRefused, match="There's a migration process in progress"):
            side.capability("postcopy-ram")
    source.migrator.continue_("pre-switchover")
    source.wait("completed")
    destination.wait("completed")
    source.capability("events")  # allowed again


def test_start_postcopy_where_it_has_no_place(machines: Sides) -> None:
    source = machines.make(append=SMALL)
    with pytest.raises(MigrationRefused, match="Enable postcopy with migrate_set_capability"):
        source.migrator.start_postcopy()
    requires("uffd")
    source.capability("postcopy-ram")
    with pytest.raises(MigrationRefused, match="Postcopy must be started after migration has been started"):
        source.migrator.start_postcopy()
