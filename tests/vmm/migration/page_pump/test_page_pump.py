"""The C page pump against its Python twins (`ram_records`, `return_path`, `pages`) on random pages and splits."""

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
from vmm.migration.page_pump.receiver import PageReceiver, ReturnPathWriter
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


def wires() -> Iterator[Wire]:
    return wire.__wrapped__()  # type: ignore[attr-defined,no-any-return]


def drain(fd: int) -> bytes:
    parts = []
    while True:
        try:
            part = os.read(fd, 1 << 20)
        except BlockingIOError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


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
    reader = RamReader(BytesSource(b"".join(parts) + RamWriter().write(EndOfBody())), {b.name: 32 * PAGE for b in blocks})
    seen: dict[tuple[str, int], bytes] = {}
    while not isinstance(record := reader.read(), EndOfBody):
        match record:
            case Page(block_name, offset, data):
                seen[block_name, offset // PAGE] = data
            case ZeroPage(block_name, offset, fill):
                seen[block_name, offset // PAGE] = bytes([fill]) * PAGE
    wanted = {
        (blocks[block].name, page): blocks[block].read(page * PAGE, PAGE) for block, page, _ in content
    }
    assert seen == wanted
    assert list(seen) == sorted(seen), "the linear scan goes upward"
    assert sender.struct.zero_pages == sum(1 for _, _, value in content if not value)
    sender.close()
    cancel.close()
    left.close()
    right.close()
    for block in blocks:
        block.close()
