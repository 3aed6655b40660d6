"""multifd: packets, compression, channels that come in any order, hostile packets, and whole migrations."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.real_machines import MIB, Sides
from tools.guest_checks import check_dirtier
from vmm.errors import StreamError
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.compression import compressor, decompressor
from vmm.migration.errors import IllegalRecord, MigrationRefused, StreamMismatch
from vmm.migration.multifd_receive import MultifdReceiver
from vmm.migration.multifd_wire import HEAD_BYTES, METHODS, PACKET, SYNC, PacketHead, hello, read_hello
from vmm.migration.page_pump.receiver import PageReceiver
from vmm.ram import RAMBlock

PAGE = 4096


# ---- the wire ----


def test_sizes_are_qemus() -> None:
    assert (HEAD_BYTES, PACKET.size, len(hello(None, 1))) == (1344, 320, 64)
    assert hello(b"u" * 16, 3)[:25] == bytes.fromhex("1122334400000001") + b"u" * 16 + b"\3"


@given(st.integers(0, 128), st.sampled_from([0, SYNC]), st.integers(0, 1 << 63))
def test_packet_heads_come_back(pages: int, flags: int, number: int) -> None:
    head = PacketHead(flags, pages, pages * PAGE, number, "pc.ram")
    data = head.encode(struct.pack(f">{pages}Q", *range(0, pages * PAGE, PAGE)))
    assert len(data) == HEAD_BYTES
    assert PacketHead.decode(data[: PACKET.size], METHODS["none"], 0) == head


FIELDS = {"magic": 0x11223344, "version": 1, "flags": 0, "allocated": 128, "pages": 1, "size": PAGE}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"magic": 7}, "magic and version"),
        ({"version": 2}, "magic and version"),
        ({"flags": 1 << 4}, "flags"),
        ({"flags": METHODS["zlib"]}, "compression"),
        ({"allocated": 129}, "page count"),
        ({"pages": 129}, "page count"),
        ({"pages": 2, "allocated": 1}, "page count"),
        ({"size": PAGE - 1}, "size of pages"),
        ({"size": 0}, "size of pages"),
    ],
)
def test_illegal_heads_are_refused(changed: dict[str, int], text: str) -> None:
    data = PACKET.pack(*{**FIELDS, **changed}.values(), 0, b"ram")
    with pytest.raises(IllegalRecord, match=f"multifd {text}"):
        PacketHead.decode(data, METHODS["none"], 0)


def test_without_pages_nothing_follows_whatever_it_says() -> None:
    data = PACKET.pack(*{**FIELDS, "pages": 0, "size": 0xFFFFFFFF}.values(), 0, b"ram")
    assert PacketHead.decode(data, METHODS["none"], 0).size == 0


def test_too_much_of_a_compressed_packet_is_refused() -> None:
    data = PACKET.pack(*{**FIELDS, "flags": METHODS["zlib"], "size": 0xFFFFFFFF}.values(), 0, b"ram")
    with pytest.raises(IllegalRecord, match="multifd size of pages"):
        PacketHead.decode(data, METHODS["zlib"], 0)


def test_greetings() -> None:
    assert read_hello(hello(None, 1), None, 2) == 1
    with pytest.raises(IllegalRecord, match="multifd channel"):
        read_hello(hello(None, 2), None, 2)
    with pytest.raises(IllegalRecord, match="magic"):
        read_hello(bytes(64), None, 2)
    with pytest.raises(StreamMismatch, match="UUID"):
        read_hello(hello(b"u" * 16, 0), None, 2)


# ---- compression ----


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_packets_of_one_stream_come_back_one_by_one(method: str) -> None:
    compress, decompress = compressor(method, 1), decompressor(method)
    for number in range(1, 20):
        pages = (bytes(range(256)) * 16 + bytes(PAGE)) * number
        assert decompress(compress(pages), len(pages)) == pages


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("size", [0, PAGE, 3 * PAGE])
def test_a_packet_gives_its_pages_and_no_more(method: str, size: int) -> None:
    data = compressor(method, 1)(b"\x11" * 2 * PAGE)
    with pytest.raises(IllegalRecord, match=f"multifd {method} stream"):
        decompressor(method)(data, size)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_bomb_is_not_unpacked(method: str) -> None:
    data = compressor(method, 9)(bytes(64 * MIB))
    with pytest.raises(IllegalRecord):
        decompressor(method)(data, PAGE)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@given(data=st.binary(max_size=60))
def test_any_bytes_are_pages_or_refused(method: str, data: bytes) -> None:
    with contextlib.suppress(IllegalRecord):
        assert len(decompressor(method)(data, PAGE)) == PAGE


# ---- hostile channels ----


def packet(pages: list[int], block: str = "ram", flags: int = 0, content: bytes | None = None) -> bytes:
    offsets = struct.pack(f">{len(pages)}Q", *(page * PAGE for page in pages))
    data = b"\x22" * PAGE * len(pages) if content is None else content
    return PacketHead(flags, len(pages), len(data), 0, block).encode(offsets) + data


class Receiving:
    """Two channels into 16 pages."""

    def __init__(self) -> None:
        self.block = RAMBlock("ram", 16 * PAGE)
        self.cancel = CancelEvent()
        self.ends = [socket.socketpair() for _ in range(3)]
        for _, ours in self.ends:
            ours.setblocking(False)
        fds = [ours.fileno() for _, ours in self.ends]
        self.failed = threading.Event()
        self.receiver = PageReceiver([self.block], StreamReader(fds[2], self.cancel.fd))
        self.multifd = MultifdReceiver(
            fds[:2], self.cancel.fd, method="none", uuid=None, on_error=self.failed.set
        )

    def send(self, channel: int, *data: bytes) -> None:
        self.ends[channel][0].sendall(b"".join(data))

    def close(self) -> None:
        self.cancel.set()
        self.multifd.close(self.cancel.set)
        for pair in self.ends:
            for end in pair:
                end.close()
        self.cancel.close()
        self.block.close()


@pytest.fixture
def receiving() -> Any:
    made = Receiving()
    yield made
    made.close()


def test_pages_of_both_channels_are_there_after_the_sync(receiving: Receiving) -> None:
    receiving.receiver.blocks.maps["zero"]["ram"].set(3)
    for channel in range(2):
        receiving.send(channel, hello(None, channel), packet([], flags=SYNC))
    receiving.multifd.sync(receiving.receiver)
    receiving.send(0, packet([3, 5]), packet([4], flags=SYNC))
    receiving.send(1, packet([9]), packet([], flags=SYNC), packet([1]))
    receiving.multifd.sync(receiving.receiver)
    assert list(receiving.receiver.received["ram"].runs()) == [(3, 3), (9, 1)]
    assert receiving.receiver.blocks.maps["zero"]["ram"].count() == 0
    assert receiving.block.read(5 * PAGE, PAGE) == b"\x22" * PAGE
    assert receiving.receiver.counters()["normal-pages"] == 4


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (packet([16]), "multifd offset"),
        (packet([1 << 51]), "multifd offset"),
        (packet([1], block="nope"), "Unknown RAMBlock"),
        (packet([1], flags=METHODS["zstd"]), "multifd compression"),
        (bytes(HEAD_BYTES), "magic and version"),
        (packet([1])[:-1], "Unexpected end|ended"),
    ],
)
def test_hostile_packets_are_refused_and_break_the_main_stream(
    receiving: Receiving, data: bytes, text: str
) -> None:
    before = receiving.block.read(0, 16 * PAGE)
    receiving.send(0, hello(None, 0), packet([], flags=SYNC), data)
    receiving.send(1, hello(None, 1), packet([], flags=SYNC))
    receiving.multifd.sync(receiving.receiver)
    receiving.send(1, packet([], flags=SYNC))
    receiving.ends[0][0].shutdown(socket.SHUT_WR)
    with pytest.raises(StreamError, match=text):
        receiving.multifd.sync(receiving.receiver)
    assert receiving.failed.is_set()
    assert receiving.block.read(0, 16 * PAGE) == before


def test_two_channels_of_one_number_are_refused(receiving: Receiving) -> None:
    for channel in range(2):
        receiving.send(channel, hello(None, 0), packet([], flags=SYNC))
    with pytest.raises(IllegalRecord, match="each once"):
        receiving.multifd.sync(receiving.receiver)


# ---- whole migrations ----

START, END = MIB, 9 * MIB


def with_multifd(machines: Sides, method: str, channels: int) -> Any:
    source, destination = machines.pair("dirtier", f"start={START:#x} end={END:#x} rounds=50")
    for side in (source, destination):
        side.capability("x-page-checksums", False)
        side.capability("multifd")
        side.migrator.set_parameters({"multifd-compression": method, "multifd-channels": channels})
    source.wait_output(lambda text: "B" in text)
    return source, destination


@pytest.mark.parametrize(("method", "channels"), [("none", 1), ("none", 4), ("zlib", 2), ("zstd", 2)])
def test_a_running_guest_moves(machines: Sides, method: str, channels: int) -> None:
    source, destination = with_multifd(machines, method, channels)
    source.migrator.set_parameters({"max-bandwidth": 64 * MIB, "downtime-limit": 500})
    source.migrator.migrate(machines.uri)
    source.wait("completed")
    destination.wait("completed")
    ram = source.migrator.query()["ram"]
    assert 0 < ram["multifd-bytes"] < ram["transferred"]
    assert ram["normal"] >= (END - START) // PAGE
    destination.wait_output(lambda text: "B" in text)
    destination.pause()
    check_dirtier(destination.machine.ram.blocks[0].read(START, END - START)[::PAGE])


def test_a_paused_guest_is_the_same_byte_for_byte(machines: Sides) -> None:
    source, destination = with_multifd(machines, "zlib", 3)
    source.pause()
    source.migrator.set_parameters({"max-bandwidth": 0})
    source.migrator.migrate(machines.uri)
    source.wait("completed")
    destination.wait("completed")
    blocks = zip(source.machine.ram.blocks, destination.machine.ram.blocks, strict=True)
    assert all(ours.read(0, 16 * MIB) == theirs.read(0, 16 * MIB) for ours, theirs in blocks)


def test_cancelled_in_the_middle(machines: Sides) -> None:
    source, destination = with_multifd(machines, "none", 2)
    source.migrator.set_parameters({"max-bandwidth": MIB, "downtime-limit": 0})
    source.migrator.migrate(machines.uri)
    source.wait("active")
    source.migrator.cancel()
    source.wait("cancelled")
    destination.wait("failed")
    said = source.serial.text
    source.wait_output(lambda text: len(text) > len(said))
    source.migrator.set_parameters({"max-bandwidth": 0, "downtime-limit": 500})
    since = len(source.events), len(destination.events)
    source.migrator.migrate(machines.uri)
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])


def test_too_few_channels_are_refused_in_time(machines: Sides) -> None:
    source, destination = with_multifd(machines, "none", 2)
    destination.migrator.set_parameters({"multifd-channels": 3, "x-handshake-timeout": 200})
    source.migrator.migrate(machines.uri)
    destination.wait("failed")
    assert "2 of 3 multifd channels have come in time" in destination.error
    source.wait("failed")


def test_one_channel_is_not_enough(machines: Sides) -> None:
    source = machines.make()
    source.capability("x-page-checksums", False)
    source.capability("multifd")
    with pytest.raises(MigrationRefused, match="multifd is not supported by current protocol"):
        source.migrator.migrate(f"file:{machines.folder}/m")
