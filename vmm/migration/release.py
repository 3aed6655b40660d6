"""release-ram: in postcopy the source gives pages back that the destination has.

    the guest runs there -> PING n after the pages sent so far -> PONG n: it has placed all of them -> discard

QEMU gives a page back as soon as it is written to the socket, and so must refuse to recover: what was on the
wire when it broke is nowhere. A destination answers a PING when it has read, and placed, what came before;
so the pages that are given back here are those that are safe there, and recovery asks for none of them.
What is given back cannot be taken back: the guest will not run here again.

Source: QEMU 7.2 migration/ram.c (ram_release_page), migration.c (postcopy_do_resume).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vmm.migration.bitmap import Bitmap
from vmm.migration.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.source_return import ReturnPathThread
    from vmm.migration.source_stream import SourceStream
    from vmm.ram import RAMBlock

__all__ = ["RamRelease"]

log = logging.getLogger(__name__)

PINGS: Final = range(0x52454C00, 0x52454D00)
"""The bytes "REL" and a number; in turns."""


class RamRelease:
    """What was given back of `blocks` in one migration; does nothing if it is not wanted. (mig/source)"""

    def __init__(self, blocks: Sequence[RAMBlock], sender: PageSender, *, is_on: bool) -> None:
        self._blocks = blocks
        self._sender = sender
        self._is_on = is_on
        self._released = {block.name: Bitmap(block.page_count) for block in blocks}
        self._asked: dict[str, Bitmap] = {}
        self._pings = 0

    @property
    def pages(self) -> int:
        """How many pages were given back."""
        return sum(bitmap.count() for bitmap in self._released.values())

    def step(self, stream: SourceStream, return_path: ReturnPathThread) -> None:
        """Between two sections of postcopy: ask, or give back what the answer was for. Raises OSError."""
        if not self._is_on or not return_path.destination_has_started:
            return
        ping = PINGS[self._pings % len(PINGS)]
        if self._asked:
            if return_path.take_pong(ping):
                self._pings += 1
                self._give_back()
            return
        asked = {}
        for block in self._blocks:
            sent = Bitmap(block.page_count)
            sent.ornot(self._sender.dirty[block.name])
            sent.andnot(self._released[block.name])
            sent.andnot(self._sender.urgent[block.name])  # a PING says nothing of the second channel
            asked[block.name] = sent
        if any(bitmap.find_next_set() is not None for bitmap in asked.values()):
            self._asked = asked
            stream.ping(ping)

    def _give_back(self) -> None:
        for block in self._blocks:
            for first, count in self._asked[block.name].runs():
                block.discard(first, count)
            self._released[block.name].or_(self._asked[block.name])
        self._asked = {}

    def without(self, written: dict[str, Bitmap]) -> None:
        """Take what was given back out of these maps: the dirty log sees that, too."""
        for name, released in self._released.items():
            written[name].andnot(released)

    def new_channel(self) -> None:
        """Nothing that was asked on the old channel will be answered. (recovery)"""
        self._asked = {}
        self._pings += 1

    def check_not_wanted(self) -> None:
        """After recovery: raises PeerError if the destination wants pages that it had confirmed."""
        for name, released in self._released.items():
            wanted = released.copy()
            wanted.and_(self._sender.dirty[name])
            if wanted.find_next_set() is not None:
                raise PeerError(
                    f"The destination asks again for {wanted.count()} pages that it had confirmed"
                )
