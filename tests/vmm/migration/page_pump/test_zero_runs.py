"""Runs of zero pages, the way that the C page pump takes them: many at once, by two threads."""

from __future__ import annotations

import socket
import threading

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vmm.migration.page_pump.test_page_pump import reading
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.page_pump.receiver import PageReceiver
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.ram_records import EndOfBody, Page, RamReader, RamWriter, ZeroPage
from vmm.ram import RAMBlock
from vmm.vmstate import BytesSource

PAGE = 4096
PAGES = 3000
"""Enough for a second thread to be called."""

ZERO, UNTOUCHED, CONTENT, CLEAN = "zero", "untouched", "content", "clean"

stretches = st.lists(
    st.tuples(
        st.sampled_from([ZERO, UNTOUCHED, CONTENT, CLEAN]),
        st.one_of(st.integers(1, 5), st.integers(60, 200), st.integers(1000, 2500)),
    ),
    max_size=12,
)


def kinds_of(runs: list[tuple[str, int]]) -> list[str]:
    """The kind of each page: the runs one after the other, and zero pages behind them."""
    kinds = [kind for kind, count in runs for _ in range(count)]
    return (kinds + [ZERO] * PAGES)[:PAGES]


class Sending:
    """A sender of one RAMBlock with pages of the given kinds, and who reads what it sends."""

    def __init__(self, kinds: list[str]) -> None:
        self.block = RAMBlock("ram", PAGES * PAGE)
        self.left, self.right = socket.socketpair()
        self.left.setblocking(False)
        self.cancel = CancelEvent()
        self.sender = PageSender([self.block], StreamWriter(self.left.fileno(), self.cancel.fd))
        for page, kind in enumerate(kinds):
            if kind == CONTENT:
                self.block.write(page * PAGE + page * 97 % PAGE, b"\x01")
            if kind != CLEAN:
                self.sender.dirty["ram"].set(page)
            if kind in (CONTENT, ZERO):
                self.sender.populated["ram"].set(page)
        self._thread, self._parts = reading(self.right.fileno())

    def records(self) -> dict[int, bool]:
        """The pages that have come, in their order, and whether each came as one of zeroes."""
        self.left.shutdown(socket.SHUT_WR)
        self._thread.join()
        stream = b"".join(self._parts) + RamWriter().write(EndOfBody())
        reader = RamReader(BytesSource(stream), {"ram": PAGES * PAGE})
        seen: dict[int, bool] = {}
        while not isinstance(record := reader.read(), EndOfBody):
            match record:
                case Page(_, offset, data):
                    assert data == self.block.read(offset, PAGE)
                    assert offset // PAGE not in seen
                    seen[offset // PAGE] = False
                case ZeroPage(_, offset, _):
                    assert offset // PAGE not in seen
                    seen[offset // PAGE] = True
        return seen

    def close(self) -> None:
        """Let go of everything."""
        self.sender.close()
        self.left.close()
        self.right.close()
        self.cancel.close()
        self.block.close()


@settings(max_examples=25)
@given(stretches, st.sampled_from([16, 256]), st.integers(50, 4000))
@example([(ZERO, PAGES)], 256, PAGES)
@example([(UNTOUCHED, 1), (ZERO, 2400), (CONTENT, 1)], 256, 2401)
@example([(CONTENT, 1), (UNTOUCHED, 130), (CLEAN, 700), (UNTOUCHED, 2000)], 16, 64)
def test_each_dirty_page_goes_once_as_what_it_is(runs: list[tuple[str, int]], batch: int, most: int) -> None:
    kinds = kinds_of(runs)
    sending = Sending(kinds)
    dirty = [page for page, kind in enumerate(kinds) if kind != CLEAN]
    left = len(dirty)
    while left:
        sent = sending.sender.send(most, batch=batch)
        assert sent == min(most, left)
        left -= sent
        assert sending.sender.dirty_count() == left
    assert sending.sender.send(most) == 0
    zeroes, pushed = sending.sender.struct.zero_pages, sending.sender.struct.pushed_pages
    page_bytes = sending.sender.struct.page_bytes
    seen = sending.records()
    assert list(seen) == dirty, "upward, and no page twice"
    assert seen == {page: kinds[page] != CONTENT for page in dirty}
    assert (zeroes, pushed) == (sum(seen.values()), len(dirty))
    name_bytes = len("\x03ram") if dirty else 0
    assert page_bytes == name_bytes + sum(9 if zero else 8 + PAGE for zero in seen.values())
    assert sending.sender.sent["ram"].count() == len(dirty)
    sending.close()


def test_what_was_found_zero_is_looked_at_again_in_the_next_call() -> None:
    """A page that is written between two calls, and found by a sync, must not go as what it was."""
    sending = Sending([ZERO] * PAGES)
    sending.sender.send(1000)
    sending.block.write(2999 * PAGE, b"new")
    sending.sender.send(PAGES)
    assert [page for page, zero in sending.records().items() if not zero] == [2999]
    sending.close()


def test_a_run_of_zero_records_leaves_absent_what_is_absent_and_wipes_the_rest() -> None:
    block = RAMBlock("ram", PAGES * PAGE)
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    receiver = PageReceiver([block], StreamReader(right.fileno(), cancel.fd))
    writer = RamWriter()
    stale = [writer.write(Page("ram", page * PAGE, b"\xff" * PAGE)) for page in (7, 8, 2000)]
    zeroes = [writer.write(ZeroPage("ram", page * PAGE)) for page in range(PAGES)]
    data = b"".join([*stale, *zeroes, writer.write(ZeroPage("ram", 5 * PAGE, 9)), writer.write(EndOfBody())])
    feeding = threading.Thread(target=left.sendall, args=(data,))
    feeding.start()
    receiver.load()
    feeding.join()
    assert receiver.missing() == {}
    assert receiver.struct.zero_pages == PAGES + 1
    assert block.read(5 * PAGE, PAGE) == b"\x09" * PAGE
    block.fill(5 * PAGE, PAGE, 0)
    populated = receiver.blocks.maps["requested"]["ram"].copy()  # an empty map of the right size
    block.find_populated(populated.address)
    assert list(populated.runs()) == [(5, 1), (7, 2), (2000, 1)]
    assert block.is_zero(0, PAGES * PAGE)
    left.close()
    right.close()
    cancel.close()
    block.close()
