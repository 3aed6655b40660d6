"""The C page pump against its Python twins (`ram_records`, `return_path`) on random pages and splits."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.requires import requires
from uffd import Mode, Userfaultfd
from vmm.errors import StreamError, StreamTruncated
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled
from vmm.migration.page_pump.receiver import Heard, PageReceiver, ReturnPathWriter
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.ram_records import EndOfBody, Page, RamReader, RamWriter, ZeroPage
from vmm.migration.return_path import MessageReader, MessageWriter, ReqPages, Shut
from vmm.ram import RAMBlock
from vmm.vmstate import BytesSource

PAGE = 4096


@dataclass
class Wire:
    """A socketpair with a cancel event: `write_fd` to `read_fd`."""

    write_fd: int
    read_fd: int
    cancel: CancelEvent


@pytest.fixture
def wire() -> Iterator[Wire]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    cancel = CancelEvent()
    with left, right:
        yield Wire(left.fileno(), right.fileno(), cancel)
    cancel.close()


def reading(fd: int) -> tuple[threading.Thread, list[bytes]]:
    """Collect everything from `fd` until its end."""
    parts: list[bytes] = []

    def collect() -> None:
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            duplicate.setblocking(True)
            while part := duplicate.recv(1 << 20):
                parts.append(part)

    thread = threading.Thread(target=collect)
    thread.start()
    return thread, parts


pages = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 31), st.one_of(st.just(0), st.integers(1, 255))),
    max_size=40,
    unique_by=lambda page: page[:2],
)


@given(pages, st.integers(1, 64))
def test_sends_exactly_the_dirty_pages_as_the_twin_reads_them(
    content: list[tuple[int, int, int]], batch: int
) -> None:
    blocks = [RAMBlock("a", 32 * PAGE), RAMBlock("block-b", 32 * PAGE)]
    left, right = socket.socketpair()
    left.setblocking(False)
    cancel = CancelEvent()
    writer = StreamWriter(left.fileno(), cancel.fd)
    sender = PageSender(blocks, writer)
    for block, page, value in content:
        blocks[block].write(page * PAGE + (page * 37) % PAGE, bytes([value]))
        sender.dirty[blocks[block].name].set(page)
        if value:
            sender.populated[blocks[block].name].set(page)
    thread, parts = reading(right.fileno())
    assert sender.send(1000, batch=batch) == len(content)
    assert sender.dirty_count() == 0
    assert sender.send(1000) == 0
    left.shutdown(socket.SHUT_WR)
    thread.join()
    reader = RamReader(
        BytesSource(b"".join(parts) + RamWriter().write(EndOfBody())), {b.name: 32 * PAGE for b in blocks}
    )
    seen: dict[tuple[str, int], bytes] = {}
    while not isinstance(record := reader.read(), EndOfBody):
        match record:
            case Page(block_name, offset, data):
                seen[block_name, offset // PAGE] = data
            case ZeroPage(block_name, offset, fill):
                seen[block_name, offset // PAGE] = bytes([fill]) * PAGE
    wanted = {(blocks[block].name, page): blocks[block].read(page * PAGE, PAGE) for block, page, _ in content}
    assert seen == wanted
    assert list(seen) == sorted(seen), "the linear scan goes upward"
    assert sender.struct.zero_pages == sum(1 for _, _, value in content if not value)
    sender.close()
    cancel.close()
    left.close()
    right.close()
    for each in blocks:
        each.close()


records = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 31), st.one_of(st.none(), st.integers(0, 255))), max_size=30
)


def stream_of(content: list[tuple[int, int, int | None]], names: list[str]) -> bytes:
    """Page records: None = ZERO, a number = a PAGE filled with it."""
    writer = RamWriter()
    parts = []
    for block, page, value in content:
        record = (
            ZeroPage(names[block], page * PAGE)
            if value is None
            else Page(names[block], page * PAGE, bytes([value]) * PAGE)
        )
        parts.append(writer.write(record))
    return b"".join(parts)


@given(records, st.lists(st.integers(1, 5000), max_size=20))
def test_loads_what_the_twin_wrote_at_any_split(
    content: list[tuple[int, int, int | None]], splits: list[int]
) -> None:
    loads_as_the_twin_wrote(content, splits, 32)


runs = st.lists(
    st.tuples(
        st.integers(0, 1), st.integers(0, 199), st.integers(1, 120), st.one_of(st.none(), st.integers(0, 255))
    ),
    max_size=6,
)


@given(runs, st.lists(st.integers(1, 100_000), max_size=30))
def test_runs_are_read_ahead_and_nothing_else_is_written(
    content: list[tuple[int, int, int, int | None]], splits: list[int]
) -> None:
    """Runs of pages, each page other than its neighbours, that end, break off and come again anywhere."""
    pages = [
        (block, page, None if value is None else (value + page) % 256)
        for block, first, count, value in content
        for page in range(first, min(first + count, 200))
    ]
    loads_as_the_twin_wrote(pages, splits, 200)


def loads_as_the_twin_wrote(
    content: list[tuple[int, int, int | None]], splits: list[int], page_count: int
) -> None:
    """Send `content` in pieces of `splits` bytes; RAM and the received map become what they say."""
    blocks = [RAMBlock("a", page_count * PAGE), RAMBlock("block-b", page_count * PAGE)]
    names = [block.name for block in blocks]
    data = stream_of(content, names) + RamWriter().write(EndOfBody())
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    receiver = PageReceiver(blocks, StreamReader(right.fileno(), cancel.fd))

    def feed() -> None:
        rest = data
        for size in splits:
            left.sendall(rest[:size])
            rest = rest[size:]
        left.sendall(rest)

    thread = threading.Thread(target=feed)
    thread.start()
    receiver.load()
    thread.join()
    model = {name: bytearray(page_count * PAGE) for name in names}
    received: dict[str, set[int]] = {name: set() for name in names}
    for block, page, value in content:
        model[names[block]][page * PAGE : (page + 1) * PAGE] = bytes([value or 0]) * PAGE
        received[names[block]].add(page)
    for block_ in blocks:
        assert block_.read(0, page_count * PAGE) == bytes(model[block_.name])
        got = {
            page
            for first, count in receiver.received[block_.name].runs()
            for page in range(first, first + count)
        }
        assert got == received[block_.name]
        block_.close()
    cancel.close()
    left.close()
    right.close()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (RamWriter().write(Page("nope", 0, bytes(PAGE))), "Unknown RAMBlock"),
        (RamWriter().write(Page("a", 32 * PAGE, bytes(PAGE))), "Illegal RAM offset"),
        ((0x28).to_bytes(8, "big"), "a RAMBlock name"),
        ((0x80).to_bytes(8, "big"), "flags"),
        (b"", "ended|end of stream"),
    ],
)
def test_refuses_what_is_not_a_page_record(wire: Wire, data: bytes, text: str) -> None:
    block = RAMBlock("a", 32 * PAGE)
    receiver = PageReceiver([block], StreamReader(wire.read_fd, wire.cancel.fd))
    os.write(wire.write_fd, data or b"\0")
    with socket.socket(fileno=os.dup(wire.write_fd)) as writing:
        writing.shutdown(socket.SHUT_WR)
    with pytest.raises(StreamError, match=f"(?i){text}") as caught:
        receiver.load()
    assert isinstance(caught.value, StreamTruncated) == (data == b"")
    assert receiver.received["a"].count() == 0
    block.close()


class Touching(threading.Thread):
    """A guest: reads one byte of each page in turn, waiting for each in C without the GIL."""

    def __init__(self, block: RAMBlock, pages: list[int]) -> None:
        super().__init__(name="guest")
        self.block, self.pages = block, pages
        self.seen: dict[int, bytes] = {}

    def run(self) -> None:
        for page in self.pages:
            self.seen[page] = self.block.read(page * PAGE, PAGE, may_wait=True)


def test_listen_serves_faults_with_requested_pages_first() -> None:
    """Source and destination of one process: touches become requests, requests become pages, all in C."""
    requires("uffd")
    pages = 512
    ours, theirs = RAMBlock("ram", pages * PAGE), RAMBlock("ram", pages * PAGE)
    for page in range(0, pages, 2):
        ours.write(page * PAGE, page.to_bytes(4, "big"))
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    cancel = CancelEvent()
    writer = StreamWriter(left.fileno(), cancel.fd)
    sender = PageSender([ours], writer)
    sender.dirty["ram"].fill(True)
    sender.populated["ram"].fill(True)
    return_path = ReturnPathWriter(right.fileno(), cancel.fd)
    receiver = PageReceiver([theirs], StreamReader(right.fileno(), cancel.fd))
    uffd = Userfaultfd()
    uffd.register(theirs.host_address, theirs.length_bytes, Mode.MISSING)
    guest = Touching(theirs, [500, 3, 250, 251, 2])
    ended: list[Heard] = []
    listener = threading.Thread(target=lambda: ended.append(receiver.listen(uffd.fd, return_path, 2)))
    returning = threading.Thread(target=lambda: sender.read_message(StreamReader(left.fileno(), cancel.fd)))
    for thread in (listener, returning, guest):
        thread.start()
    # Requests only, until the guest has what it wants: nothing is pushed.
    writer.write(b"\x02" + (2).to_bytes(4, "big"))
    while len(guest.seen) < 5:
        if sender.wait_for_request(cancel.fd, 1000):
            sender.send(100, requests_only=True)
    assert sender.struct.requested_pages == 5
    assert sender.struct.pushed_pages == 0
    assert receiver.latency().count == 5
    while sender.send(64) == 64:
        pass
    writer.write(RamWriter().write(EndOfBody()) + b"\x7e" + (2).to_bytes(4, "big"))
    writer.write(b"\x08" + bytes([0, 2, 0, 4, 0, 0, 0, 9]))  # PING 9
    writer.write(b"\x03" + (2).to_bytes(4, "big") + RamWriter().write(EndOfBody()))
    writer.write(b"\x7e" + (2).to_bytes(4, "big") + b"\x00")
    writer.flush()
    listener.join()
    assert ended == [Heard.END]
    returning.join()  # the PONG
    guest.join()
    assert receiver.missing() == {}
    uffd.unregister(theirs.host_address, theirs.length_bytes)
    uffd.close()
    assert theirs.read(0, pages * PAGE) == ours.read(0, pages * PAGE)
    assert guest.seen[500] == ours.read(500 * PAGE, PAGE)
    assert receiver.struct.zero_pages == pages // 2 + 1  # page 0 holds the number 0
    sender.close()
    return_path.close()
    cancel.close()
    left.close()
    right.close()
    ours.close()
    theirs.close()


def test_a_lost_channel_keeps_missing_pages_missing_and_serves_zero_pages() -> None:
    requires("uffd")
    theirs = RAMBlock("ram", 8 * PAGE)
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    reader = StreamReader(right.fileno(), cancel.fd)
    return_path = ReturnPathWriter(right.fileno(), cancel.fd)
    receiver = PageReceiver([theirs], reader)
    left.sendall(stream_of([(0, 1, None)], ["ram"]) + RamWriter().write(EndOfBody()))
    receiver.load()  # page 1 came as zero in precopy and was left absent
    uffd = Userfaultfd()
    uffd.register(theirs.host_address, theirs.length_bytes, Mode.MISSING)
    left.close()
    assert receiver.listen(uffd.fd, return_path, 2) is Heard.LOST
    receiver.no_channel()
    raised: list[type[BaseException]] = []

    def hold() -> None:
        try:
            receiver.listen(uffd.fd, return_path, 2)
        except Cancelled as error:
            raised.append(type(error))

    holding = threading.Thread(target=hold)
    holding.start()
    guest = Touching(theirs, [1, 2])
    guest.start()
    while not receiver.requested["ram"].test(2):
        pass
    assert guest.seen == {1: bytes(PAGE)}
    assert guest.is_alive(), "a missing page must not turn into zeroes"
    assert receiver.missing() == {"ram": 7}
    cancel.set()
    holding.join()
    assert raised == [Cancelled]
    page = b"\x11" * PAGE
    source = RAMBlock("page", PAGE)
    source.write(0, page)
    assert uffd.copy(theirs.host_address + 2 * PAGE, source.host_address, PAGE).errno == 0
    guest.join()
    assert guest.seen[2] == page
    uffd.unregister(theirs.host_address, theirs.length_bytes)
    uffd.close()
    return_path.close()
    cancel.close()
    right.close()
    theirs.close()
    source.close()


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40), st.integers(0, 40)), max_size=20),
    st.lists(st.integers(1, 60), max_size=12),
)
def test_requests_are_taken_or_refused_as_the_twin_says(
    wanted: list[tuple[str, int, int]], splits: list[int]
) -> None:
    blocks = [RAMBlock("a", 32 * PAGE), RAMBlock("b", 32 * PAGE)]
    left, right = socket.socketpair()
    left.setblocking(False)
    cancel = CancelEvent()
    sender = PageSender(blocks, StreamWriter(left.fileno(), cancel.fd))
    for bitmap in sender.dirty.values():
        bitmap.fill(True)
    writer = MessageWriter()
    good = [row for row in wanted if row[2] and row[1] + row[2] <= 32]
    first_bad = next((i for i, row in enumerate(wanted) if row not in good), None)
    data = b"".join(writer.write(ReqPages(name, page * PAGE, count * PAGE)) for name, page, count in wanted)
    data += writer.write(Shut(0))
    for size in [*splits, len(data)]:
        right.sendall(data[:size])
        data = data[size:]
    if first_bad is None:
        kind, payload = sender.read_message(StreamReader(left.fileno(), cancel.fd))
        message = MessageReader({"a": 32, "b": 32}).read_payload(BytesSource(payload), kind, len(payload))
        assert message == Shut(0)
        asked = {(name, page + i) for name, page, count in wanted for i in range(count)}
        taken = {
            (b.name, p) for b in blocks for p in range(32) if sender.blocks.maps["queued"][b.name].test(p)
        }
        assert taken == asked
        assert sender.struct.requests == len(wanted)
    else:
        with pytest.raises(StreamError):
            sender.read_message(StreamReader(left.fileno(), cancel.fd))
    sender.close()
    cancel.close()
    left.close()
    right.close()
    for block in blocks:
        block.close()
