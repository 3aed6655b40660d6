"""The page maps of both sides as a plain model: dirty, sent, requested, received; which page goes next.

Source                                     Destination
    dirty     must still be sent               requested   asked for, on its way
    sent      went out at least once           received    is here

           missing --------- page fault --------> requested
              |  \\                                    |
              |   \\------- page arrives -----+        | page arrives
              |                              v        v
              +<---- discard (set-up only) -- received

Rules
1. A page of the destination is in exactly one of three states, as drawn; every other move is an error.
2. received -> missing only during set-up and discard, that is before LISTEN.
3. The next page is the oldest request that is still dirty, else the next dirty page from the cursor on, which
   goes on behind the page that was sent last: what a guest touches next is often the neighbour.
4. When postcopy starts the sent map is masked with the dirty bitmap, as the founding document has it: pages
   that went out and are out of date. It is for the statistics. What is discarded is EVERY page that is not
   up to date, also those never sent: a huge page of the destination's kernel may have filled in neighbours.

One bit per page in a Python int. The page pump does the same in C for speed (`page_pump/`), and is compared
with this model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum

from vmm.migration import wire
from vmm.migration.commands import PostcopyRamDiscard
from vmm.migration.errors import IllegalPageMove

__all__ = ["DestinationMaps", "PageState", "SourceMaps", "discard_commands", "ranges"]


def mask(first: int, count: int) -> int:
    """A map with the bits of `count` pages from `first` on."""
    return ((1 << count) - 1) << first


def ranges(bits: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits as (first page, page count), upward."""
    first = 0
    while bits:
        gap = (bits & -bits).bit_length() - 1
        bits >>= gap
        first += gap
        count = (~bits & (bits + 1)).bit_length() - 1
        yield first, count
        bits >>= count
        first += count


def discard_commands(block: str, stale: int) -> Iterator[PostcopyRamDiscard]:
    """The commands that discard every page of `stale`, 12 ranges in each (postcopy-ram.c)."""
    pairs = [(first * wire.PAGE_SIZE_BYTES, count * wire.PAGE_SIZE_BYTES) for first, count in ranges(stale)]
    for start in range(0, len(pairs), wire.MAX_DISCARDS_PER_COMMAND):
        yield PostcopyRamDiscard(block, tuple(pairs[start : start + wire.MAX_DISCARDS_PER_COMMAND]))


class SourceMaps:
    """The source's maps for RAMBlocks of the given page counts; all pages are dirty at first."""

    def __init__(self, page_counts: Mapping[str, int]) -> None:
        self._page_counts = dict(page_counts)
        self._names = list(page_counts)
        self.dirty = {name: mask(0, count) for name, count in page_counts.items()}
        self.sent = dict.fromkeys(page_counts, 0)
        self._requests: deque[tuple[str, int]] = deque()
        self._cursor = (0, 0)  # index of the block, page

    def _check(self, block: str, first: int, count: int = 1) -> None:
        pages = self._page_counts[block]
        if first < 0 or count < 1 or first + count > pages:
            raise IndexError(f"Pages {first} to {first + count - 1} of RAMBlock '{block}' with {pages} pages")

    @property
    def dirty_count(self) -> int:
        """Pages that must still be sent."""
        return sum(bits.bit_count() for bits in self.dirty.values())

    def mark_dirty(self, block: str, first: int, count: int = 1) -> int:
        """Pages that the guest or the VMM wrote; returns how many were clean before."""
        self._check(block, first, count)
        before = self.dirty[block]
        self.dirty[block] = before | mask(first, count)
        return (self.dirty[block] ^ before).bit_count()

    def request(self, block: str, first: int, count: int = 1) -> None:
        """Put pages that the destination waits for in front of all others; those in the queue stay there."""
        self._check(block, first, count)
        for page in range(first, first + count):
            if (block, page) not in self._requests:
                self._requests.append((block, page))

    def next_page(self) -> tuple[str, int, bool] | None:
        """Take the page that goes next: block, page, whether it was requested; None if no page is dirty."""
        while self._requests:
            block, page = self._requests.popleft()
            if self.dirty[block] >> page & 1:
                return self._take(block, page, requested=True)
        index, page = self._cursor
        # Once round all blocks, and the first one twice: its pages before the cursor come last.
        for _ in range(len(self._names) + 1):
            block = self._names[index]
            rest = self.dirty[block] >> page
            if rest:
                return self._take(block, page + (rest & -rest).bit_length() - 1, requested=False)
            index, page = (index + 1) % len(self._names), 0
        return None

    def _take(self, block: str, page: int, *, requested: bool) -> tuple[str, int, bool]:
        self.dirty[block] &= ~(1 << page)
        self.sent[block] |= 1 << page
        self._cursor = (self._names.index(block), page + 1)
        return block, page, requested

    def start_postcopy(self) -> dict[str, int]:
        """Mask the sent map with the dirty bitmap (rule 4) and return what must be discarded, per block."""
        for block, dirty in self.dirty.items():
            self.sent[block] &= dirty
        return dict(self.dirty)

    def resume(self, received: Mapping[str, int]) -> None:
        """Recovery: dirty is now what the destination has not received; requests are asked again."""
        self._requests.clear()
        for block, bits in received.items():
            self.dirty[block] = mask(0, self._page_counts[block]) & ~bits


class PageState(Enum):
    """Where a page of the destination is; the three valid combinations of received and requested."""

    MISSING = "missing"
    REQUESTED = "requested"
    RECEIVED = "received"


class DestinationMaps:
    """The destination's maps for RAMBlocks of the given page counts; all pages are missing at first."""

    def __init__(self, page_counts: Mapping[str, int]) -> None:
        self._page_counts = dict(page_counts)
        self.received = dict.fromkeys(page_counts, 0)
        self.requested = dict.fromkeys(page_counts, 0)
        self._is_listening = False

    def _check(self, block: str, first: int, count: int = 1) -> None:
        pages = self._page_counts[block]
        if first < 0 or count < 1 or first + count > pages:
            raise IndexError(f"Pages {first} to {first + count - 1} of RAMBlock '{block}' with {pages} pages")

    def state(self, block: str, page: int) -> PageState:
        """The state of a page."""
        self._check(block, page)
        if self.received[block] >> page & 1:
            return PageState.RECEIVED
        if self.requested[block] >> page & 1:
            return PageState.REQUESTED
        return PageState.MISSING

    @property
    def missing_counts(self) -> dict[str, int]:
        """How many pages of each block are not received, requested ones included."""
        return {name: count - self.received[name].bit_count() for name, count in self._page_counts.items()}

    def listen(self) -> None:
        """Set-up is over: from now on no page goes back to missing, and faults are served."""
        self._is_listening = True

    def discard(self, block: str, first: int, count: int) -> None:
        """received -> missing; raises IllegalPageMove from LISTEN on, and changes nothing then."""
        self._check(block, first, count)
        if self._is_listening:
            raise IllegalPageMove(block, first, self.state(block, first).value, PageState.MISSING.value)
        self.received[block] &= ~mask(first, count)

    def fault(self, block: str, page: int) -> bool:
        """A thread waits for a page: missing -> requested. True if it must be asked for now.

        A page already requested is on its way; one already received only wants the thread to be woken.
        Raises IllegalPageMove before LISTEN, when nothing can be missing.
        """
        state = self.state(block, page)
        if not self._is_listening:
            raise IllegalPageMove(block, page, state.value, PageState.REQUESTED.value)
        if state is PageState.MISSING:
            self.requested[block] |= 1 << page
        return state is PageState.MISSING

    def receive(self, block: str, page: int) -> bool:
        """A page has been placed: missing or requested -> received. True if a thread waits for it.

        Before LISTEN a page may come again: the new bytes overwrite. From LISTEN on a second one raises
        IllegalPageMove.
        """
        state = self.state(block, page)
        if state is PageState.RECEIVED and self._is_listening:
            raise IllegalPageMove(block, page, state.value, state.value)
        self.received[block] |= 1 << page
        self.requested[block] &= ~(1 << page)
        return state is PageState.REQUESTED

    def pending_requests(self) -> Iterator[tuple[str, int]]:
        """Every page that is requested and not received: what is asked for again after recovery."""
        for block, bits in self.requested.items():
            for first, count in ranges(bits):
                for page in range(first, first + count):
                    yield block, page
