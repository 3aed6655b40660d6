"""Two machines in one process, real sockets between them: the source, the destination and the migrator."""

from __future__ import annotations

import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import uffd
from tests.support.fake_machine import FakeMachine
from tests.support.requires import requires
from vmm.migration import commands, peer, wire
from vmm.migration.device_state import RAM_SECTION_ID, RAM_VERSION, DeviceState
from vmm.migration.errors import MigrationRefused
from vmm.migration.kept import KeptState
from vmm.migration.migrator import Migrator
from vmm.migration.ram_records import EndOfBody, MemSize, RamWriter
from vmm.migration.stream import (
    Configuration,
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionFull,
    SectionStart,
    encode,
)
from vmm.ram import RamKind
from vmm.run_state import RunState

DEADLINE_S = 60.0
KINDS = [RamKind.ANONYMOUS, RamKind.MEMFD_SHARED, RamKind.MEMFD_PRIVATE]


class Side:
    """A machine, its migrator, and the events it has reported."""

    def __init__(self, **options: Any) -> None:
        self.machine = FakeMachine(**options)
        self.events: list[tuple[str, Any]] = []
        self.changed = threading.Condition()
        self.migrator = Migrator(self.machine, self._notify)
        self.migrator.set_capabilities([{"capability": "events", "state": True}])

    def _notify(self, name: str, data: dict[str, Any]) -> None:
        with self.changed:
            self.events.append((name, next(iter(data.values()))))
            self.changed.notify_all()

    def wait(self, *statuses: str) -> str:
        """Until the migration has one of these statuses; which."""
        with self.changed:
            found = self.changed.wait_for(
                lambda: [s for n, s in self.events if n == "MIGRATION" and s in statuses], DEADLINE_S
            )
        assert found, (statuses, self.events, self.migrator.query())
        return str(found[-1])

    def values(self, name: str) -> list[Any]:
        return [value for event, value in self.events if event == name]

    def postcopy(self) -> None:
        self.migrator.set_capabilities([{"capability": "postcopy-ram", "state": True}])

    def close(self) -> None:
        assert self.migrator.shutdown(DEADLINE_S)
        self.machine.close()


@pytest.fixture
def sides() -> Iterator[list[Side]]:
    made: list[Side] = []
    yield made
    for side in made:
        side.close()


def pair(
    sides: list[Side], tmp_path: pathlib.Path, *, paused: bool = False, **options: Any
) -> tuple[Side, Side, str]:
    source = Side(**options)
    destination = Side(**{**options, "incoming": True, "paused": paused})
    sides += [source, destination]
    uri = f"unix:{tmp_path}/m.sock"
    destination.migrator.incoming(uri)
    return source, destination, uri


def same_ram(source: Side, destination: Side) -> bool:
    blocks = zip(source.machine.ram.blocks, destination.machine.ram.blocks, strict=True)
    return all(a.read(0, a.length_bytes) == b.read(0, b.length_bytes) for a, b in blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", ["async", "sync"])
def test_precopy_of_a_running_guest(
    sides: list[Side], tmp_path: pathlib.Path, kind: RamKind, rung: str
) -> None:
    requires("wp_async")
    source, destination, uri = pair(sides, tmp_path, paused=True, kind=kind, rung=rung)
    source.machine.cont()
    source.migrator.migrate(uri)
    assert source.wait("completed", "failed") == "completed", source.migrator.query().get("error-desc")
    assert destination.wait("completed", "failed") == "completed"
    assert source.values("MIGRATION") == ["setup", "active", "completed"]
    assert destination.values("MIGRATION") == ["setup", "active", "completed"]
    passes = source.values("MIGRATION_PASS")
    assert passes == list(range(1, len(passes) + 1))
    assert len(passes) >= 2
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert destination.machine.run_state is RunState.PAUSED
    assert same_ram(source, destination)
    assert destination.machine.wrong_pages() == []
    assert destination.machine.rounds == source.machine.rounds
    reply = source.migrator.query()
    assert reply["x-dirty-log"]["rung"] == rung
    assert reply["ram"]["remaining"] == 0
    assert reply["ram"]["normal"] + reply["ram"]["duplicate"] >= 1024


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paused", [True, False])
def test_postcopy_of_a_running_guest(
    sides: list[Side], tmp_path: pathlib.Path, kind: RamKind, paused: bool
) -> None:
    requires("uffd")
    source, destination, uri = pair(sides, tmp_path, paused=paused, kind=kind, pages=4096, working_set=2048)
    source.postcopy()
    destination.postcopy()
    source.migrator.set_parameters(
        {"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 0 if paused else 16 << 20}
    )
    source.machine.cont()
    while source.machine.rounds < 2:
        time.sleep(0)
    source.migrator.migrate(uri)
    source.wait("active")
    while not source.migrator.query()["ram"]["normal"]:
        time.sleep(0)
    source.migrator.start_postcopy()
    assert source.wait("completed", "failed", "postcopy-paused") == "completed", source.migrator.query().get(
        "error-desc"
    )
    assert destination.wait("completed", "failed", "postcopy-paused") == "completed"
    assert source.values("MIGRATION") == ["setup", "active", "postcopy-active", "completed"]
    assert destination.values("MIGRATION") == ["setup", "active", "postcopy-active", "completed"]
    assert destination.values("POSTCOPY_STATE") == ["advise", "discard", "listening", "running", "end"]
    numbers = source.migrator.query()["x-postcopy"]
    assert numbers["discarded-pages"] > 0
    assert numbers["pushed-pages"] > 0
    if paused:
        assert same_ram(source, destination)
    else:
        assert numbers["requested-pages"] > 0
        assert destination.migrator.query()["x-fault-latency"]["count"] > 0
        destination.machine.pause()
    assert destination.machine.wrong_pages() == []


@pytest.mark.parametrize("wish", ["continue", "cancel"])
def test_postcopy_pauses_before_the_switchover(sides: list[Side], tmp_path: pathlib.Path, wish: str) -> None:
    requires("uffd")
    source, destination, uri = pair(sides, tmp_path)
    source.postcopy()
    destination.postcopy()
    source.migrator.set_capabilities([{"capability": "pause-before-switchover", "state": True}])
    source.migrator.set_parameters({"max-bandwidth": 1 << 20, "downtime-limit": 0})  # no end of precopy
    source.machine.cont()
    source.migrator.migrate(uri)
    source.wait("active")
    source.migrator.start_postcopy()
    source.wait("pre-switchover")
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    assert not destination.machine.started.is_set()
    if wish == "continue":
        source.migrator.continue_("pre-switchover")
        assert source.wait("completed", "failed") == "completed"
        assert destination.wait("completed") == "completed"
        after = ["postcopy-active", "completed"]
        destination.machine.pause()
        assert destination.machine.wrong_pages() == []
    else:
        source.migrator.cancel()
        source.wait("cancelled")
        after = ["cancelling", "cancelled"]
        assert source.machine._wanted.is_set()  # it runs again
    assert source.values("MIGRATION") == ["setup", "active", "pre-switchover", *after]


def test_cancel_gives_the_guest_back(sides: list[Side], tmp_path: pathlib.Path) -> None:
    source, destination, uri = pair(sides, tmp_path)
    source.migrator.set_parameters({"max-bandwidth": 1 << 20})
    source.machine.cont()
    source.migrator.migrate(uri)
    source.wait("active")
    source.migrator.cancel()
    assert source.wait("cancelled") == "cancelled"
    assert source.values("MIGRATION") == ["setup", "active", "cancelling", "cancelled"]
    assert source.machine.run_state is RunState.RUNNING
    assert source.migrator.query() == {"status": "cancelled"}
    assert destination.wait("failed") == "failed"
    assert destination.machine.run_state is RunState.INMIGRATE
    # and the same pair can do it again
    source.migrator.set_parameters({"max-bandwidth": 0})
    source.migrator.migrate(uri)
    assert destination.wait("completed") == "completed"
    destination.machine.pause()
    assert destination.machine.wrong_pages() == []
    source.wait("completed")
    assert source.migrator.results == {
        ("source", "completed"): 1,
        ("source", "failed"): 0,
        ("source", "cancelled"): 1,
        ("destination", "completed"): 0,
        ("destination", "failed"): 0,
    }
    assert destination.migrator.results[("destination", "failed")] == 1
    assert destination.migrator.results[("destination", "completed")] == 1


@pytest.mark.parametrize(
    ("junk", "text"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "Not a migration stream"),
        (b"", "end of stream"),
        (b"QEVM\0\0\0\3\7\0\0\0\7microvm\0", "Machine type"),
    ],
)
def test_strangers_do_not_hurt_an_incoming_vm(
    sides: list[Side], tmp_path: pathlib.Path, junk: bytes, text: str
) -> None:
    source, destination, uri = pair(sides, tmp_path, paused=True)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"{tmp_path}/m.sock")
        stranger.sendall(junk)
    destination.wait("failed")
    assert text in destination.migrator.query()["error-desc"]
    source.machine.cont()
    source.migrator.migrate(uri)
    assert destination.wait("completed") == "completed"
    assert destination.machine.wrong_pages() == []


@pytest.mark.parametrize("number", ["99999999999", "1" * 5000, "\u0663"])
def test_a_descriptor_number_that_there_is_not(sides: list[Side], number: str) -> None:
    side = Side(incoming=True)
    sides.append(side)
    with pytest.raises(MigrationRefused, match="has not been found"):
        side.migrator.incoming(f"fd:{number}")


def stranger_with(tmp_path: pathlib.Path, *commands_: commands.CommandRecord) -> socket.socket:
    """One who sends all that there is before the first page, then these."""
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(f"{tmp_path}/m.sock")
    ram, sizes = RamWriter(), MemSize((("ram", 1024 * 4096),))
    records = (Header(), Configuration("none"), commands.OpenReturnPath(), commands.PostcopyAdvise())
    stranger.sendall(b"".join(encode(record) for record in records))
    stranger.sendall(encode(SectionStart(RAM_SECTION_ID, "ram", 0, RAM_VERSION)))
    stranger.sendall(ram.write(sizes) + ram.write(EndOfBody()) + encode(SectionFooter(RAM_SECTION_ID)))
    stranger.sendall(b"".join(encode(command) for command in commands_))
    return stranger


def zero_pages(count: int) -> bytes:
    """ram END with these pages."""
    pages = b"".join(
        wire.U64.pack(page * 4096 | (0x22 if page else 0x02)) + (b"" if page else b"\3ram") + b"\0"
        for page in range(count)
    )
    section = encode(SectionEnd(RAM_SECTION_ID)) + pages + RamWriter().write(EndOfBody())
    return section + encode(SectionFooter(RAM_SECTION_ID))


def check_can_try_again(source: Side, destination: Side, uri: str) -> None:
    source.machine.cont()
    source.migrator.migrate(uri)
    assert destination.wait("completed") == "completed"
    assert destination.machine.wrong_pages() == []


ARMING = (
    commands.Ping(peer.HELLO_MAGIC),
    commands.HandOver(bytes(16)),
    commands.Ping(wire.PING_BEFORE_PACKAGE),
)
"""After these a destination has sensitised its RAM, and the package is all that may come."""


def is_sensitised(side: Side) -> bool:
    """By the kernel's own word; the read guard says the same."""
    block = side.machine.ram.blocks[0]
    text = pathlib.Path("/proc/self/smaps").read_text()
    area = text.partition(f"{block.host_address:x}-")[2]
    is_registered = " um" in area.partition("VmFlags:")[2].partition("\n")[0]
    assert is_registered is (block._guard is not None)
    return is_registered


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (zero_pages(1), "got SectionEnd"),
        (encode(SectionFull(4, "timer", 0, 2)), "got SectionFull"),
        (encode(EndOfStream()), "got EndOfStream"),
        (b"", "end of stream"),
    ],
    ids=["pages", "device", "eof", "cut"],
)
def test_before_the_package_comes_nothing_else(
    record: bytes, said: str, sides: list[Side], tmp_path: pathlib.Path
) -> None:
    """RAM is sensitised while the source's guest still runs: who touched it would wait for ever."""
    requires("uffd")
    source, destination, uri = pair(sides, tmp_path, paused=True)
    destination.postcopy()
    with stranger_with(tmp_path, *ARMING) as stranger:
        reply = b""
        while not reply.endswith(wire.PING_BEFORE_PACKAGE.to_bytes(4, "big")):
            reply += stranger.recv(4096)
        assert is_sensitised(destination)
        stranger.sendall(record)
        stranger.shutdown(socket.SHUT_WR)
        destination.wait("failed")
    assert said.lower() in destination.migrator.query()["error-desc"].lower()
    assert not is_sensitised(destination)
    assert not destination.machine.started.is_set()
    check_can_try_again(source, destination, uri)


def test_a_destination_that_quits_before_the_package(sides: list[Side], tmp_path: pathlib.Path) -> None:
    requires("uffd")
    _, destination, _ = pair(sides, tmp_path, paused=True)
    destination.postcopy()
    with stranger_with(tmp_path, *ARMING) as stranger:
        while not stranger.recv(4096).endswith(wire.PING_BEFORE_PACKAGE.to_bytes(4, "big")):
            pass
        assert destination.migrator.shutdown(DEADLINE_S)
    assert not destination.machine.started.is_set()


def test_a_package_in_a_package(sides: list[Side], tmp_path: pathlib.Path) -> None:
    requires("uffd")
    source, destination, uri = pair(sides, tmp_path, paused=True)
    destination.postcopy()
    package = b"\0"
    for _ in range(2000):  # more than Python's stack takes
        package = encode(commands.Packaged(package))
    with stranger_with(tmp_path) as stranger:
        stranger.sendall(package)
        destination.wait("failed")
    assert destination.migrator.query()["error-desc"] == "PACKAGED inside a package"
    check_can_try_again(source, destination, uri)


def test_a_stream_that_ends_between_discard_and_listen(sides: list[Side], tmp_path: pathlib.Path) -> None:
    """The guest was started, and the migration hung."""
    requires("uffd")
    source, destination, uri = pair(sides, tmp_path, paused=True)
    destination.postcopy()
    with stranger_with(tmp_path, commands.PostcopyRamDiscard("ram", ((0, 4096),))) as stranger:
        stranger.sendall(zero_pages(1024) + DeviceState(source.machine.sections(), KeptState()).save())
        stranger.sendall(encode(EndOfStream()))
        stranger.shutdown(socket.SHUT_WR)
        destination.wait("failed")
    assert destination.migrator.query()["error-desc"] == "The stream ended in postcopy state 'discard'"
    assert not destination.machine.started.is_set()
    check_can_try_again(source, destination, uri)


def test_ram_that_cannot_be_sensitised(
    sides: list[Side], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt fails, the guest stays at the source, and both can try again."""
    requires("uffd")
    source, destination, uri = pair(sides, tmp_path, paused=True)
    source.postcopy()
    destination.postcopy()

    class Refusing(uffd.Userfaultfd):
        def register(self, address: int, length: int, mode: uffd.Mode) -> None:
            raise uffd.UffdError("UFFDIO_REGISTER: EBUSY")

    source.migrator.set_parameters({"max-bandwidth": 1 << 20})
    source.machine.cont()
    with monkeypatch.context() as patched:
        patched.setattr("vmm.migration.listen.Userfaultfd", Refusing)
        source.migrator.migrate(uri)
        source.wait("active")
        source.migrator.start_postcopy()
        destination.wait("failed")
        assert source.wait("failed", "postcopy-paused") == "failed"
    assert destination.migrator.query()["error-desc"] == "UFFDIO_REGISTER: EBUSY"
    assert source.machine.run_state is RunState.RUNNING
    source.migrator.set_parameters({"max-bandwidth": 0})
    check_can_try_again(source, destination, uri)


def test_nobody_there(sides: list[Side], tmp_path: pathlib.Path) -> None:
    source = Side()
    sides.append(source)
    source.machine.cont()
    source.migrator.migrate(f"unix:{tmp_path}/absent")
    assert source.wait("failed") == "failed"
    query = source.migrator.query()
    assert query["status"] == "failed"
    assert query["error-desc"] == f"Failed to connect to '{tmp_path}/absent': No such file or directory"
    assert source.machine.run_state is RunState.RUNNING


def test_to_a_file_and_back(sides: list[Side], tmp_path: pathlib.Path) -> None:
    source = Side()
    sides.append(source)
    source.machine.cont()
    source.migrator.migrate(f"file:{tmp_path}/state")
    assert source.wait("completed", "failed") == "completed", source.migrator.query().get("error-desc")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    destination = Side(incoming=True, paused=True)
    sides.append(destination)
    destination.migrator.incoming(f"file:{tmp_path}/state")
    assert destination.wait("completed", "failed") == "completed"
    assert same_ram(source, destination)
    assert destination.machine.wrong_pages() == []


def test_postcopy_over_a_one_way_transport_is_refused(sides: list[Side], tmp_path: pathlib.Path) -> None:
    requires("uffd")
    source = Side()
    sides.append(source)
    source.postcopy()
    with pytest.raises(MigrationRefused, match="two-way"):
        source.migrator.migrate(f"file:{tmp_path}/state")
    assert source.migrator.query() == {}
    assert list(tmp_path.iterdir()) == []
