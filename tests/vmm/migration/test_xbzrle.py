"""XBZRLE: C against its Python twin, hostile encodings, the cache, and whole migrations through it."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.real_machines import MIB, Sides, until
from tools.guest_checks import check_dirtier
from vmm.errors import StreamError
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import IllegalRecord
from vmm.migration.page_pump.native import ffi, lib
from vmm.migration.page_pump.receiver import PageReceiver
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.page_pump.xbzrle import XbzrleCache, XbzrleSource
from vmm.migration.params import Capabilities, Parameters
from vmm.migration.ram_records import EndOfBody, Page, RamReader, RamRecord, RamWriter, XbzrlePage, ZeroPage
from vmm.migration.stats import MigrationStats
from vmm.migration.xbzrle import XbzrleStats, decode, encode
from vmm.ram import RAMBlock
from vmm.vmstate import BytesSource

PAGE = 4096


def c_encode(before: bytes, now: bytes) -> bytes | None:
    out = ffi.new("uint8_t[]", PAGE)
    length = lib.pp_xbzrle_encode(before, now, out)
    return None if length < 0 else bytes(ffi.buffer(out, length))


def c_decode(encoded: bytes, before: bytes) -> bytes | None:
    """The page between two others, which must stay as they are."""
    room = ffi.new("uint8_t[]", b"\xaa" * PAGE + before + b"\xaa" * PAGE)
    result = lib.pp_xbzrle_decode(encoded, len(encoded), room + PAGE)
    after = bytes(ffi.buffer(room, 3 * PAGE))
    assert after[:PAGE] == after[2 * PAGE :] == b"\xaa" * PAGE
    if result < 0:
        assert after[PAGE : 2 * PAGE] == before, "a refused encoding leaves the page alone"
        return None
    return after[PAGE : 2 * PAGE]


changes = st.lists(st.tuples(st.integers(0, PAGE - 1), st.binary(min_size=1, max_size=300)), max_size=30)


def changed(page: bytes, where: list[tuple[int, bytes]]) -> bytes:
    now = bytearray(page)
    for start, data in where:
        now[start : start + len(data)] = data
    return bytes(now[:PAGE])


@given(st.integers(0, 255), changes, changes)
def test_c_and_python_encode_the_same_and_decode_each_other(
    fill: int, old: list[tuple[int, bytes]], new: list[tuple[int, bytes]]
) -> None:
    before = changed(bytes([fill]) * PAGE, old)
    now = changed(before, new)
    encoded = encode(before, now)
    assert c_encode(before, now) == encoded
    if encoded is not None:
        assert len(encoded) < PAGE
        assert decode(encoded, before) == now
        assert c_decode(encoded, before) == now
        assert (encoded == b"") == (before == now)


def test_a_page_that_changed_everywhere_goes_whole() -> None:
    before, every_second = bytes(PAGE), b"\x01\x00" * (PAGE // 2)
    assert c_encode(before, b"\x01" * PAGE) is encode(before, b"\x01" * PAGE) is None
    assert c_encode(before, every_second) is encode(before, every_second) is None


HOSTILE = {
    "half a length": b"\x80",
    "a length of three bytes": b"\x80\x80\x01\x01\x55",
    "no second length": b"\x01",
    "nothing changes": b"\x01\x00",
    "nothing stays, in the middle": b"\x00\x01\x55\x00\x01\x55",
    "fewer bytes than it says": b"\x00\x04\x55",
    "beyond the page": b"\xff\x1f\x02\x55\x55",
    "far beyond the page": b"\xff\x7f\xff\x7f" + b"\x55" * 16383,
    "the second one beyond the page": b"\xf0\x1f\x01\x55\x0f\x01\x55",
}


@pytest.mark.parametrize("encoded", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_encodings_are_refused_and_write_nothing(encoded: bytes) -> None:
    assert c_decode(encoded, bytes(PAGE)) is None
    with pytest.raises(IllegalRecord):
        decode(encoded, bytes(PAGE))


@given(st.binary(max_size=40))
def test_any_bytes_are_refused_by_both_or_decoded_alike(encoded: bytes) -> None:
    try:
        wanted: bytes | None = decode(encoded, bytes(PAGE))
    except IllegalRecord:
        wanted = None
    assert c_decode(encoded, bytes(PAGE)) == wanted


# ---- the sender's cache ----


class Link:
    """A sender with a cache, and what a reader of its records has then."""

    def __init__(self, pages: int, cache_pages: int) -> None:
        self.block = RAMBlock("ram", pages * PAGE)
        self._left, self._right = socket.socketpair()
        self._left.setblocking(False)
        self._cancel = CancelEvent()
        self.sender = PageSender([self.block], StreamWriter(self._left.fileno(), self._cancel.fd))
        self.sender.populated["ram"].fill(True)
        self.cache = XbzrleCache(cache_pages * PAGE)
        self.cache.struct.age = 1
        self.sender.struct.xbzrle = self.cache.struct
        self.there: dict[int, bytes] = {}

    def send(self, *pages: int) -> list[RamRecord]:
        """Send these pages; the records."""
        for page in pages:
            self.sender.dirty["ram"].set(page)
        self.sender.struct.last_block = -1
        assert self.sender.send(1000) == len(pages)
        self._right.setblocking(False)
        data = b""
        while True:
            try:
                data += self._right.recv(1 << 20)
            except BlockingIOError:
                break
        reader = RamReader(
            BytesSource(data + RamWriter().write(EndOfBody())), {"ram": self.block.length_bytes}
        )
        records: list[RamRecord] = []
        while not isinstance(record := reader.read(), EndOfBody):
            records.append(record)
            self._take(record)
        return records

    def _take(self, record: RamRecord) -> None:
        match record:
            case Page(_, offset, data):
                self.there[offset // PAGE] = data
            case ZeroPage(_, offset, fill):
                self.there[offset // PAGE] = bytes([fill]) * PAGE
            case XbzrlePage(_, offset, encoded):
                self.there[offset // PAGE] = decode(encoded, self.there[offset // PAGE])

    def close(self) -> None:
        self.sender.close()
        self.cache.close()
        self._cancel.close()
        self._left.close()
        self._right.close()
        self.block.close()


@given(
    st.integers(1, 8),
    st.lists(
        st.one_of(
            st.none(),
            st.tuples(st.integers(0, 7), st.integers(0, PAGE - 9), st.binary(min_size=1, max_size=8)),
        ),
        max_size=60,
    ),
)
def test_whatever_is_written_the_other_side_has_it(
    cache_pages: int, course: list[tuple[int, int, bytes] | None]
) -> None:
    """None is a sync: what was written since is sent."""
    link = Link(8, 1 << (cache_pages - 1).bit_length())
    written: set[int] = set()
    for step in [*course, None]:
        if step is None:
            link.send(*sorted(written))
            written.clear()
            link.cache.struct.age += 1
        else:
            page, start, data = step
            link.block.write(page * PAGE + start, data)
            written.add(page)
    for page, content in link.there.items():
        assert content == link.block.read(page * PAGE, PAGE)
    link.close()


def test_plain_then_difference_then_nothing_then_zero() -> None:
    link = Link(2, 2)
    link.block.write(0, b"\x11" * PAGE)
    assert [type(record) for record in link.send(0)] == [Page]
    link.block.write(7, b"\x22")
    assert link.send(0) == [XbzrlePage("ram", 0, b"\x07\x01\x22")]
    assert link.send(0) == [], "written, but nothing changed"
    link.block.write(0, bytes(PAGE))
    assert link.send(0) == [ZeroPage("ram", 0)]
    link.block.write(9, b"\x33")
    assert link.send(0) == [XbzrlePage("ram", 0, b"\x09\x01\x33")]
    link.block.write(0, bytes(i % 255 + 1 for i in range(PAGE)))
    assert [type(record) for record in link.send(0)] == [Page]
    stats = link.cache.stats()
    assert (stats.asked, stats.misses, stats.pages, stats.encoded_bytes) == (5, 1, 3, 6)
    assert stats.overflows == 1
    link.close()


def test_a_fresh_page_keeps_its_place_in_the_cache() -> None:
    link = Link(4, 1)
    for page in range(2):
        link.block.write(page * PAGE, b"\x11")
        link.send(page)
    link.block.write(5, b"\x12")
    assert [type(record) for record in link.send(0)] == [XbzrlePage]
    link.cache.struct.age += 3  # it has not been written since
    link.block.write(PAGE + 5, b"\x12")
    link.send(1)
    link.block.write(PAGE + 6, b"\x12")
    assert [type(record) for record in link.send(1)] == [XbzrlePage]
    link.close()


# ---- the receiver ----


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (XbzrlePage("ram", PAGE, b"\x00\x01\x55"), "the page itself before its difference"),
        (XbzrlePage("ram", 0, b"\x01\x00"), "stays inside the page"),
        (XbzrlePage("ram", 0, b"\xff\x1f\x02\x55\x55"), "stays inside the page"),
        (XbzrlePage("ram", 16 * PAGE, b""), "Illegal RAM offset"),
    ],
)
def test_the_destination_refuses_hostile_pages(record: XbzrlePage, text: str) -> None:
    block = RAMBlock("ram", 16 * PAGE)
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    receiver = PageReceiver([block], StreamReader(right.fileno(), cancel.fd))
    writer = RamWriter()
    left.sendall(writer.write(Page("ram", 0, b"\x01" * PAGE)) + writer.write(record) + bytes(5000))
    with pytest.raises(StreamError, match=text):
        receiver.load()
    assert block.read(0, PAGE) == b"\x01" * PAGE
    for each in (left, right, cancel, block):
        each.close()


@pytest.mark.parametrize(
    "head", [b"\x02\x00\x00", b"\x01\x10\x01"], ids=["another encoding", "a page and more"]
)
def test_both_readers_refuse_an_illegal_head(head: bytes) -> None:
    data = RamWriter().write(Page("ram", 0, b"\x01" * PAGE)) + (0x60).to_bytes(8, "big") + head + bytes(5000)
    reader = RamReader(BytesSource(data), {"ram": 16 * PAGE})
    reader.read()
    with pytest.raises(StreamError):
        reader.read()
    block = RAMBlock("ram", 16 * PAGE)
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    receiver = PageReceiver([block], StreamReader(right.fileno(), cancel.fd))
    left.sendall(data)
    with pytest.raises(StreamError, match="XBZRLE page"):
        receiver.load()
    for each in (left, right, cancel, block):
        each.close()


def test_a_difference_to_a_page_of_zeroes_that_nothing_touched() -> None:
    block = RAMBlock("ram", 4 * PAGE)
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    receiver = PageReceiver([block], StreamReader(right.fileno(), cancel.fd))
    writer = RamWriter()
    records = (ZeroPage("ram", PAGE), XbzrlePage("ram", PAGE, b"\x05\x01\x77"), EndOfBody())
    left.sendall(b"".join(writer.write(record) for record in records))
    receiver.load()
    assert block.read(PAGE, PAGE) == bytes(5) + b"\x77" + bytes(PAGE - 6)
    for each in (left, right, cancel, block):
        each.close()


# ---- statistics and whole migrations ----


def test_rates_are_those_since_the_last_sync() -> None:
    then = XbzrleStats(1 << 20, asked=10, misses=10)
    now = replace(then, asked=30, misses=15, pages=15, encoded_bytes=15 * 64, overflows=1).since(then)
    assert now.query() == {
        "cache-size": 1 << 20,
        "bytes": 960,
        "pages": 15,
        "cache-miss": 15,
        "cache-miss-rate": 0.25,
        "encoding-rate": 64.0,
        "overflow": 1,
    }
    assert XbzrleStats().since(XbzrleStats()).query()["encoding-rate"] == 0


START, END = MIB, 9 * MIB


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_running_guest_moves_by_differences(machines: Sides, mode: str) -> None:
    """Two passes of whole pages, each so long that the guest writes to all; then differences."""
    source, destination = machines.postcopy_pair("dirtier", f"start={START:#x} end={END:#x} rounds=50")
    source.capability("xbzrle")
    source.wait_output(lambda text: "B" in text)

    def shown() -> Any:
        return source.migrator.query().get("xbzrle-cache", {"pages": 0})

    source.migrator.set_parameters({"max-bandwidth": 32 * MIB, "downtime-limit": 0})
    source.migrator.migrate(machines.uri)
    until(lambda: shown()["pages"], "differences")
    if mode == "postcopy":
        source.migrator.start_postcopy()  # too late if the guest did not run meanwhile
    source.migrator.set_parameters({"downtime-limit": 2000})
    source.wait("completed")
    destination.wait("completed")
    assert shown()["cache-size"] == 64 * MIB
    assert 0 < shown()["bytes"] < shown()["pages"] * 16, "a dirtier changes one byte of a page"
    destination.wait_output(lambda text: "B" in text)
    destination.pause()
    memory = destination.machine.ram.blocks[0].read(START, END - START)
    check_dirtier(memory[::PAGE])


def test_another_cache_size_takes_effect_at_the_next_sync() -> None:
    block = RAMBlock("ram", 2 * PAGE)
    left, right = socket.socketpair()
    left.setblocking(False)
    cancel = CancelEvent()
    sender = PageSender([block], StreamWriter(left.fileno(), cancel.fd))
    sender.populated["ram"].fill(True)
    capabilities, parameters = Capabilities(), Parameters()
    stats = MigrationStats(lambda: 0, 0, 300)
    XbzrleSource(sender, capabilities, parameters, stats).synced()
    assert stats.snapshot().xbzrle is None
    assert sender.struct.xbzrle == ffi.NULL, "without the capability"
    capabilities.set_one("xbzrle", True)
    xbzrle = XbzrleSource(sender, capabilities, parameters, stats)
    assert stats.snapshot().xbzrle == XbzrleStats(64 << 20)
    for size, pages in ((1 << 20, 1), (PAGE, 2)):
        parameters.set({"xbzrle-cache-size": size})
        xbzrle.synced()
        for value in range(2):
            block.write(0, bytes([17 + value]))
            sender.dirty["ram"].set(0)
            sender.send(1)
        xbzrle.synced()
        now = stats.snapshot().xbzrle
        assert now is not None
        assert (now.cache_size_bytes, now.asked, now.misses, now.pages) == (size, 2 * pages, pages, pages)
        assert (now.miss_rate, now.encoding_rate) == (0.5, PAGE / 3)
    xbzrle.end()
    assert sender.struct.xbzrle == ffi.NULL, "in postcopy pages go whole"
    for each in (sender, left, right, cancel, block):
        each.close()


def test_without_the_capability_there_is_no_cache(machines: Sides) -> None:
    source, destination = machines.pair("auditor", "pages=64 beat=4")
    source.wait_heartbeat()
    source.migrator.set_parameters({"max-bandwidth": 0})
    source.migrator.migrate(machines.uri)
    destination.wait("completed")
    source.wait("completed")
    assert "xbzrle-cache" not in source.migrator.query()
