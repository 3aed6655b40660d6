"""x-page-checksums: no flipped bit of the stream becomes a page that differs, and who gets checksums."""

from __future__ import annotations

import random
import socket
import threading
from typing import Any

import pytest

from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.relay import Relay
from tests.support.requires import requires
from vmm.errors import PageferryError, StreamError
from vmm.migration import commands
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import PageDamaged, ParameterRefused
from vmm.migration.page_pump.receiver import PageReceiver, ReturnPathWriter
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.page_pump.xbzrle import XbzrleCache
from vmm.migration.ram_records import EndOfBody, Page, RamReader, RamWriter, ZeroPage, with_checksum
from vmm.migration.stream import SectionEnd, SectionFooter, encode
from vmm.ram import RAMBlock
from vmm.vmstate import BytesSource

PAGES = 6
SEED = 1
FLIPS = 1000


# ---- the records, in memory ----


class Wire:
    """What a sender of two RAMBlocks writes, and a receiver that gets something else."""

    def __init__(self) -> None:
        self.cancel = CancelEvent()
        self.left, self.right = socket.socketpair()
        self.left.setblocking(False)
        self.right.setblocking(False)
        self.ours = [RAMBlock(name, PAGES * PAGE) for name in ("ram", "rom")]
        self.theirs = [RAMBlock(name, PAGES * PAGE) for name in ("ram", "rom")]
        self.sender = PageSender(self.ours, StreamWriter(self.left.fileno(), self.cancel.fd))
        self.sender.checksum_pages()

    def send(self) -> bytes:
        """Two passes: whole pages and zero pages, then differences; the bytes."""
        source = random.Random(SEED)
        cache = XbzrleCache(64 * PAGE)
        cache.struct.age = 1
        self.sender.struct.xbzrle = cache.struct
        for block in self.ours:
            self.sender.populated[block.name].fill(True)
            for page in range(0, PAGES, 2):
                block.write(page * PAGE, source.randbytes(PAGE))
            self.sender.dirty[block.name].fill(True)
        self.sender.send(1000)
        for block in self.ours:
            block.write(2 * PAGE + 100, b"other")
            self.sender.dirty[block.name].set(2)
        self.sender.send(1000)
        assert cache.struct.sent_pages == 2
        return self.right.recv(1 << 20)

    def receive(self, data: bytes) -> None:
        """Into fresh RAM; raises what the pump raises."""
        for block in self.theirs:
            block.discard_all()
        one, other = socket.socketpair()
        other.setblocking(False)
        receiver = PageReceiver(self.theirs, StreamReader(other.fileno(), self.cancel.fd))
        receiver.expect_checksums()
        try:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            receiver.load()
        finally:
            one.close()
            other.close()

    def differing(self) -> list[str]:
        pairs = zip(self.ours, self.theirs, strict=True)
        return [a.name for a, b in pairs if a.read(0, PAGES * PAGE) != b.read(0, PAGES * PAGE)]

    def close(self) -> None:
        self.sender.close()
        owned: list[Any] = [self.left, self.right, self.cancel, *self.ours, *self.theirs]
        for each in owned:
            each.close()


@pytest.fixture
def wire() -> Any:
    made = Wire()
    yield made
    made.close()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_twin_reads_and_writes_what_the_pump_sends(wire: Wire) -> None:
    data = wire.send() + RamWriter().write(EndOfBody())
    reader = RamReader(BytesSource(data), {block.name: PAGES * PAGE for block in wire.ours})
    writer, again = RamWriter(), b""
    while not isinstance(record := reader.read(), EndOfBody):
        assert not isinstance(record, Page | ZeroPage) or with_checksum(record) == record
        again += writer.write(record)
    assert again + writer.write(EndOfBody()) == data
    wire.receive(data)
    assert wire.differing() == []


def test_no_flipped_bit_passes(wire: Wire) -> None:
    """All bits of headers, names, fill bytes, differences and checksums, and some of the pages."""
    data = wire.send() + RamWriter().write(EndOfBody())
    chosen, damaged = random.Random(SEED), 0
    large = 6 * PAGE  # bytes of content; what is left are headers, names, sums and differences
    bits = set(chosen.sample(range(8 * len(data)), FLIPS)) | set(range(8 * 40))
    bits |= set(range(8 * (len(data) - 250), 8 * len(data)))
    assert len(data) - large < 600
    for bit in sorted(bits):
        with pytest.raises(StreamError) as caught:
            wire.receive(flipped(data, bit))
        damaged += isinstance(caught.value, PageDamaged)
    assert damaged > FLIPS // 2


def test_it_says_which_page(wire: Wire) -> None:
    record = with_checksum(Page("rom", 3 * PAGE, bytes(range(256)) * 16))
    data = flipped(RamWriter().write(record), 8 * 500)
    with pytest.raises(PageDamaged, match=r"page at 0x3000 of RAMBlock 'rom'.*0x[0-9a-f]{16}, got") as caught:
        wire.receive(data)
    assert (caught.value.block, caught.value.page_offset, caught.value.offset) == ("rom", 3 * PAGE, 0)
    assert wire.theirs[1].read(0, PAGES * PAGE) == bytes(PAGES * PAGE), "it was not placed"
    with pytest.raises(PageDamaged):
        RamReader(BytesSource(data), {"rom": PAGES * PAGE}).read()


@pytest.mark.parametrize("expected", [True, False])
def test_checksums_come_as_agreed(wire: Wire, expected: bool) -> None:
    """A page without one is refused where each must have one, and the other way round."""
    page = Page("ram", 0, bytes([7]) * PAGE)
    data = RamWriter().write(page if expected else with_checksum(page))
    if expected:
        with pytest.raises(StreamError, match="flags"):
            wire.receive(data)
        return
    one, other = socket.socketpair()
    other.setblocking(False)
    with one, other:
        one.sendall(data)
        receiver = PageReceiver(wire.theirs, StreamReader(other.fileno(), wire.cancel.fd))
        with pytest.raises(StreamError, match="flags"):
            receiver.load()


def test_a_page_that_is_written_to_meanwhile_is_sent_as_one_or_the_other(wire: Wire) -> None:
    """A writer that never stops: each copy has its own checksum."""
    block, stop = wire.ours[0], threading.Event()

    def write() -> None:
        value = 0
        while not stop.is_set():
            value = value % 255 + 1
            block.write(0, bytes([value]) * (PAGES * PAGE))

    wire.sender.populated["ram"].fill(True)
    block.write(0, b"\1" * (PAGES * PAGE))
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(200):
            wire.sender.dirty["ram"].fill(True)
            wire.sender.struct.last_block = -1
            wire.sender.send(PAGES)
            wire.receive(wire.right.recv(1 << 20) + RamWriter().write(EndOfBody()))
    finally:
        stop.set()
        thread.join()


# ---- whole migrations in this process ----


def shown(side: Side) -> Any:
    return side.migrator.query().get("x-page-checksums")


def equal(source: Side, destination: Side) -> bool:
    ours, theirs = (side.machine.ram.blocks[0] for side in (source, destination))
    return ours.read(0, ours.length_bytes) == theirs.read(0, theirs.length_bytes)


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
@pytest.mark.parametrize("checksums", [True, False])
def test_with_and_without(machines: Sides, way: str, checksums: bool) -> None:
    if way == "postcopy":
        requires("uffd")
    make = machines.pair if way == "precopy" else machines.postcopy_pair
    source, destination = make(append="pages=512 beat=4", checksums=checksums)
    source.wait_heartbeat()
    if way == "precopy":
        source.migrator.migrate(machines.uri)
    else:
        machines.to_postcopy(source, destination)
    machines.finish(source, destination)
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good
    assert shown(source) == ({"state": True} if checksums else None)
    counted = destination.migrator.query()["x-received"]
    pages = counted["normal-pages"] + counted["zero-pages"]
    assert shown(destination) == ({"state": True, "checked-pages": pages} if checksums else None)


def test_who_cannot_say_that_he_understands_gets_none(machines: Sides) -> None:
    source = machines.make("hello", memory=2 * MIB)
    source.migrator.migrate(f"file:{machines.folder}/saved")
    source.wait("completed")
    assert shown(source)["state"] is False
    assert "one-way" in shown(source)["reason"]
    destination = machines.make("hello", memory=2 * MIB, incoming=True)
    destination.migrator.incoming(f"file:{machines.folder}/saved")
    destination.wait("completed")
    assert shown(destination) == {"state": False, "reason": "the source sends none"}


def test_a_stock_destination_gets_none(machines: Sides) -> None:
    """Whose answer differs by a byte, and so is no Pageferry's."""
    source, _ = machines.pair("hello", memory=2 * MIB)

    def change_back(total: int, data: bytes) -> bytes:
        return data.replace(b"YRFP", b"stoc")

    relay = Relay(f"{machines.folder}/relay", f"{machines.folder}/m", change_back=change_back)
    try:
        source.migrator.migrate(f"unix:{machines.folder}/relay")
        source.wait("completed")
    finally:
        relay.close()
    assert shown(source) == {"state": False, "reason": "the destination is no Pageferry"}


def test_not_with_multifd(machines: Sides) -> None:
    side = machines.make("hello", memory=2 * MIB)
    with pytest.raises(ParameterRefused, match="no place for page checksums"):
        side.capability("multifd")


class Flipper:
    """Flips one bit of the stream, counted from the first page record on."""

    def __init__(self, bit: int) -> None:
        self._bit = bit
        self._seen = b""
        self.done = False

    def __call__(self, total: int, data: bytes) -> bytes:
        mark = encode(commands.PageChecksums())
        before = len(self._seen)
        self._seen += data
        start = self._seen.find(mark)
        at = start + len(mark) + self._bit // 8 - before
        if start < 0 or not 0 <= at < len(data):
            return data
        self.done = True
        return flipped(data, 8 * at + self._bit % 8)


def test_precopy_fails_and_the_guest_stays(machines: Sides) -> None:
    """Sampled bits of what comes after the agreement: a named error, or RAM as it was."""
    source = machines.make("hello", memory=MIB, paused=True)
    destination = machines.make("hello", memory=MIB, incoming=True, paused=True)
    destination.migrator.incoming(machines.uri)
    damaged = 0
    for number, bit in enumerate(random.Random(SEED).sample(range(8 * 12000), 40)):
        flipper = Flipper(bit)
        relay = Relay(f"{machines.folder}/r{number}", f"{machines.folder}/m", flipper)
        since = len(source.events), len(destination.events)
        try:
            source.migrator.migrate(f"unix:{machines.folder}/r{number}")
            source.wait("failed", "completed", since=since[0])
            status = destination.wait("failed", "completed", since=since[1])
        finally:
            relay.close()
        assert flipper.done, bit
        if status == "completed":
            assert equal(source, destination), bit
            break
        damaged += "Checksum of the page" in destination.error
        assert destination.error, bit
    assert damaged > 30


def test_postcopy_pauses_and_recovery_sends_the_page_again(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append="pages=512 beat=4")
    source.wait_heartbeat()

    class FlipLater:
        """A bit of each chunk from a moment on."""

        is_on = False

        def __call__(self, total: int, data: bytes) -> bytes:
            return flipped(data, 4 * len(data)) if self.is_on and len(data) > PAGE else data

    flip = FlipLater()
    relay = Relay(f"{machines.folder}/relay", f"{machines.folder}/m", flip)
    try:
        source.migrator.set_parameters(
            {"max-bandwidth": 1, "max-postcopy-bandwidth": MIB, "downtime-limit": 0}
        )
        source.migrator.migrate(f"unix:{machines.folder}/relay")
        source.wait("active")
        source.migrator.start_postcopy()
        destination.wait_event("POSTCOPY_STATE", "running")
        flip.is_on = True
        destination.wait("postcopy-paused")
        source.wait("postcopy-paused")
    finally:
        relay.close()
    assert "Checksum of the page at 0x" in destination.error
    assert shown(destination)["state"] is True
    again = f"unix:{machines.folder}/again"
    since = len(source.events), len(destination.events)
    destination.migrator.recover(again)
    source.migrator.migrate(again, resume=True)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good


def test_a_flipped_discard_is_noticed(machines: Sides) -> None:
    """Else a page that is out of date would stay."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append="pages=512 beat=4")
    source.wait_heartbeat()

    def change(total: int, data: bytes) -> bytes:
        mark = b"\x08\x00\x06"
        at = data.find(mark)
        if at < 0 or data[at + 5] != 0:
            return data
        name = data[at + 6]
        return flipped(data, 8 * (at + 7 + name + 1 + 14) + 4)  # the length of the first range, +- a page

    relay = Relay(f"{machines.folder}/relay", f"{machines.folder}/m", change)
    try:
        source.migrator.set_parameters({"max-bandwidth": 1, "downtime-limit": 0})
        source.migrator.migrate(f"unix:{machines.folder}/relay")
        source.migrator.start_postcopy()
        source.wait("failed")
    finally:
        relay.close()
    until(lambda: destination.status == "failed", "the destination has failed")
    assert "Digest of the received pages" in destination.error or "Range to discard" in destination.error
    source.wait_heartbeat(2)


def test_a_damaged_page_is_not_placed_from_listen_on() -> None:
    requires("uffd")
    block = RAMBlock("ram", 4 * PAGE)
    one, other = socket.socketpair()
    other.setblocking(False)
    cancel = CancelEvent()
    receiver = PageReceiver([block], StreamReader(other.fileno(), cancel.fd))
    receiver.expect_checksums()
    from uffd import Features, Mode, Userfaultfd

    uffd = Userfaultfd(Features.THREAD_ID)
    uffd.register(block.host_address, 4 * PAGE, Mode.MISSING)
    try:
        writer = RamWriter()
        good = writer.write(with_checksum(Page("ram", PAGE, b"\5" * PAGE)))
        bad = flipped(writer.write(with_checksum(Page("ram", 2 * PAGE, b"\6" * PAGE))), 8 * 1000)
        one.sendall(encode(SectionEnd(2)) + good + bad + writer.write(EndOfBody()) + encode(SectionFooter(2)))
        return_path = ReturnPathWriter(other.fileno(), cancel.fd)
        with pytest.raises(PageferryError, match="page at 0x2000 of RAMBlock 'ram'"):
            receiver.listen(uffd.fd, return_path, 2)
        assert list(receiver.received["ram"].runs()) == [(1, 1)]
        assert receiver.struct.checked_pages == 1
    finally:
        uffd.unregister(block.host_address, 4 * PAGE)
        uffd.close()
        for each in (one, other, cancel, block):
            each.close()
