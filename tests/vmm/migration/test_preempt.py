"""postcopy-preempt: requested pages over a connection of their own, to the end, through cuts, and refused."""

from __future__ import annotations

import pathlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.real_machines import MIB, Side, Sides, until
from tests.support.requires import requires
from uffd import Mode, Userfaultfd
from vmm.errors import StreamError
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled, MigrationRefused, PeerError
from vmm.migration.lobby import Lobby
from vmm.migration.page_pump.receiver import Heard, PageReceiver, ReturnPathWriter
from vmm.migration.ram_records import EndOfBody, Page, RamWriter, ZeroPage
from vmm.ram import RAMBlock

PAGE = 4096
GUEST = "pages=512 beat=16"
SECTION = (2).to_bytes(4, "big")


def preempting(machines: Sides) -> tuple[Side, Side]:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    for side in (source, destination):
        side.capability("postcopy-preempt")
    source.wait_heartbeat()
    return source, destination


def requested(source: Side) -> int:
    return int(source.migrator.query()["x-postcopy"]["requested-pages"])


def test_the_guest_is_whole_and_its_requests_went_the_second_way(machines: Sides) -> None:
    source, destination = preempting(machines)
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=1)
    destination.wait_heartbeat(2)
    sent = source.migrator._source._phases.preempt  # type: ignore[union-attr]  # no command shows it
    assert sent.pages > 0
    count = sent.pages
    until(lambda: requested(source) >= count, "the statistics")
    machines.finish(source, destination)
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)
    ram = source.migrator.query()["ram"]
    assert ram["normal"] + ram["duplicate"] >= 16 * MIB // PAGE
    assert destination.migrator.query()["x-received"]["duplicates"] == 0, "no page went both ways"


def test_recovery_makes_both_connections_again(machines: Sides) -> None:
    source, destination = preempting(machines)
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=1)
    for number in range(4):
        until(lambda: requested(source), "a request")
        since = len(source.events), len(destination.events)
        (source, destination)[number % 2].migrator.pause()
        source.wait("postcopy-paused", since=since[0])
        destination.wait("postcopy-paused", since=since[1])
        since = len(source.events), len(destination.events)
        destination.migrator.recover(f"{machines.uri}{number}")
        source.migrator.migrate(f"{machines.uri}{number}", resume=True)
        source.wait("postcopy-active", since=since[0])
        destination.wait("postcopy-active", since=since[1])
    destination.wait_heartbeat(2)
    since = len(source.events), len(destination.events)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def test_precopy_leaves_the_second_connection_unused(machines: Sides) -> None:
    source, destination = preempting(machines)
    source.migrator.set_parameters({"max-bandwidth": 0})
    source.migrator.migrate(machines.uri)
    source.wait("completed")
    destination.wait("completed")
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def test_with_release_ram_what_went_the_second_way_is_kept(machines: Sides) -> None:
    source, destination = preempting(machines)
    source.capability("release-ram")
    source.machine.ram.blocks[0].write(8 * MIB, b"\x77" * (2 * MIB))  # the guest never asks for it
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=MIB // 2)
    assert source.migrator._source is not None
    phases = source.migrator._source._phases  # no command shows it
    assert phases is not None
    until(lambda: phases.release.pages, "pages given back")
    for name, urgent in phases.sender.urgent.items():
        both = urgent.copy()
        both.and_(phases.release._released[name])
        assert both.count() == 0
    machines.finish(source, destination)
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def test_a_source_without_the_capability_is_refused(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    destination.capability("postcopy-preempt")
    destination.migrator.set_parameters({"x-handshake-timeout": 100})
    source.migrator.migrate(machines.uri)
    destination.wait("failed")
    assert "no second connection" in destination.error
    source.wait("failed")


def test_one_channel_is_not_enough(machines: Sides, tmp_path: pathlib.Path) -> None:
    requires("uffd")
    source = machines.make()
    source.capability("postcopy-ram")
    source.capability("postcopy-preempt")
    with pytest.raises(MigrationRefused, match="multi-channel"):
        source.migrator.migrate(f"file:{tmp_path}/m")


# ---- the lobby: which connection is the second one ----


class Door:
    def __init__(self, folder: pathlib.Path) -> None:
        self.path = str(folder / "door")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        listener.setblocking(False)
        self.lobby = Lobby(listener, lambda: 200)
        self.cancel = CancelEvent()
        self.peers: list[socket.socket] = []

    def connect(self, said: bytes = b"") -> None:
        peer = socket.socket(socket.AF_UNIX)
        self.peers.append(peer)
        peer.connect(self.path)
        if said:
            peer.sendall(said)


@pytest.fixture
def door(tmp_path: pathlib.Path) -> Iterator[Door]:
    made = Door(tmp_path)
    yield made
    for peer in made.peers:
        peer.close()
    made.lobby.close()
    made.cancel.close()


HELLO = b"QEVM\0\0\0\3\x08"


def test_the_second_is_the_one_that_came_directly_after_the_first(door: Door) -> None:
    door.connect()  # a stranger, silent, before both
    door.connect(HELLO)
    door.connect()
    first = door.lobby.admit(door.cancel.fd)
    assert first.recv(9) == HELLO
    second = door.lobby.admit_next(door.cancel.fd, first.fileno())
    door.peers[2].sendall(b"second")
    assert second.recv(6) == b"second"
    first.close()
    second.close()


def test_a_second_one_that_comes_late(door: Door) -> None:
    door.connect(HELLO)
    first = door.lobby.admit(door.cancel.fd)
    timer = threading.Timer(0.02, door.connect)
    timer.start()
    door.lobby.admit_next(door.cancel.fd, first.fileno()).close()
    timer.join()
    first.close()


def test_no_second_one(door: Door) -> None:
    door.connect(HELLO)
    first = door.lobby.admit(door.cancel.fd)
    with pytest.raises(PeerError, match="second connection"):
        door.lobby.admit_next(door.cancel.fd, first.fileno())
    door.peers[0].close()
    with pytest.raises(PeerError, match="second connection"):
        door.lobby.admit_next(door.cancel.fd, first.fileno())
    door.cancel.set()
    with pytest.raises(Cancelled):
        door.lobby.admit_next(door.cancel.fd, first.fileno())
    first.close()


# ---- the destination's loop with two channels ----


class Listening:
    """A destination from LISTEN on, with both ends of its channels in this test."""

    def __init__(self) -> None:
        self.block = RAMBlock("ram", 8 * PAGE)
        self.cancel = CancelEvent()
        self.main, ours = socket.socketpair()
        self.second, ours_too = socket.socketpair()
        self._ours = (ours, ours_too)
        for each in self._ours:
            each.setblocking(False)
        self._return_path = ReturnPathWriter(ours.fileno(), self.cancel.fd)
        self.receiver = PageReceiver([self.block], StreamReader(ours.fileno(), self.cancel.fd))
        self.receiver.preempt_channel(StreamReader(ours_too.fileno(), self.cancel.fd))
        self._uffd = Userfaultfd()
        self._uffd.register(self.block.host_address, self.block.length_bytes, Mode.MISSING)
        self.end: Heard | Exception | None = None
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self) -> None:
        try:
            self.end = self.receiver.listen(self._uffd.fd, self._return_path, 2)
        except Exception as error:
            self.end = error

    def close(self) -> None:
        self.cancel.set()
        self.thread.join()
        self._uffd.unregister(self.block.host_address, self.block.length_bytes)
        self._uffd.close()
        self._return_path.close()
        for each in (self.main, self.second, *self._ours, self.cancel, self.block):
            each.close()


@pytest.fixture
def listening() -> Iterator[Listening]:
    requires("uffd")
    made = Listening()
    yield made
    made.close()


def rest(first: int, count: int) -> bytes:
    """A section with these pages, and the end of the stream."""
    writer = RamWriter()
    pages = b"".join(writer.write(Page("ram", page * PAGE, b"\x22" * PAGE)) for page in range(first, count))
    return b"\x03" + SECTION + pages + writer.write(EndOfBody()) + b"\x7e" + SECTION + b"\0"


def test_the_end_of_the_first_is_not_the_end_of_both(listening: Listening) -> None:
    listening.main.sendall(rest(2, 8))
    until(lambda: listening.receiver.received["ram"].count() == 6, "the first channel's pages")
    writer = RamWriter()
    data = writer.write(Page("ram", 0, b"\x33" * PAGE)) + writer.write(ZeroPage("ram", PAGE))
    for at in range(0, len(data), 1000):  # at any split
        listening.second.sendall(data[at : at + 1000])
    until(lambda: listening.receiver.missing() == {}, "the second channel's pages")
    assert listening.thread.is_alive()
    listening.second.sendall(writer.write(EndOfBody()))
    listening.thread.join()
    assert listening.end is Heard.END
    assert listening.block.read(0, 1) == b"\x33"


def test_the_second_may_be_closed_after_the_end_of_the_first_only(listening: Listening) -> None:
    listening.main.sendall(rest(0, 8))
    until(lambda: listening.receiver.missing() == {}, "all pages")
    listening.second.close()
    listening.thread.join()
    assert listening.end is Heard.END


def test_a_second_that_breaks_is_a_loss(listening: Listening) -> None:
    listening.second.close()
    listening.thread.join()
    assert listening.end is Heard.LOST


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x08" + bytes(20), "flags"),
        (RamWriter().write(Page("nope", 0, bytes(PAGE))), "Unknown RAMBlock"),
        ((0x28).to_bytes(8, "big"), "a RAMBlock name"),
        (RamWriter().write(Page("ram", 8 * PAGE, bytes(PAGE))), "Illegal RAM offset"),
        (RamWriter().write(ZeroPage("ram", 0, 7)), "fill byte"),
    ],
)
def test_what_is_no_page_is_refused_there_too(listening: Listening, data: bytes, text: str) -> None:
    listening.second.sendall(data)
    listening.thread.join()
    assert isinstance(listening.end, StreamError)
    assert text in str(listening.end)
