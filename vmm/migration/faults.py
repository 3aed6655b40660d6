"""Deliberate damage, so that tests can show that their checks see it: `-global migration.x-fault=KIND`.

    drop-dirty     the source forgets one page that was written after it was sent   (precopy)
    drop-discard   the source does not discard one page that is out of date         (postcopy)
    drop-request   the source forgets one requested page, and that it is dirty       (postcopy)
    flip-byte      the destination flips a byte of its last page with content before it starts the guest

Never active unless asked for; each kind strikes once.
"""

from __future__ import annotations

import enum
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.migration.bitmap import Bitmap
    from vmm.migration.page_pump.sender import PageSender
    from vmm.ram import GuestRam

__all__ = ["FaultKind", "TestFault"]

log = logging.getLogger(__name__)

PAGE_BYTES = 4096

PASSED_OVER = 8
"""Arbitrary: more pages than a guest of ours writes below its working set."""


class FaultKind(enum.Enum):
    """What is damaged."""

    DROP_DIRTY = "drop-dirty"
    DROP_DISCARD = "drop-discard"
    DROP_REQUEST = "drop-request"
    FLIP_BYTE = "flip-byte"


class TestFault:
    """One kind of damage, or none."""

    def __init__(self, kind: FaultKind | None = None) -> None:
        self._kind = kind

    def before_last_pages(self, sender: PageSender) -> None:
        """The last sync is done; the guest is stopped. (source)"""
        if self._kind is FaultKind.DROP_DIRTY:
            self._drop_one(sender, sender.dirty)
        if self._kind is FaultKind.DROP_REQUEST:
            sender.struct.drop_request = 1

    def before_discard(self, sender: PageSender, stale: Mapping[str, Bitmap]) -> None:
        """The discard set is known. (source)"""
        if self._kind is FaultKind.DROP_DISCARD:
            self._drop_one(sender, stale)

    def _drop_one(self, sender: PageSender, maps: Mapping[str, Bitmap]) -> None:
        """Of the pages that the destination has the PASSED_OVER-th: the first may be a stack page, whose old
        bytes do no harm, and one that was sent late may not have been written since."""
        for name, bitmap in maps.items():
            known = bitmap.copy()
            known.and_(sender.sent[name])
            place = min(PASSED_OVER, known.count() - 1)
            for first, count in known.runs():
                if place < count:
                    log.warning("x-fault %s: page %d of '%s'", self._kind, first + place, name)
                    bitmap.clear(first + place)
                    return
                place -= count

    def before_start(self, ram: GuestRam, received: Mapping[str, Bitmap]) -> None:
        """Everything that is here before the guest starts is here. (destination)"""
        if self._kind is not FaultKind.FLIP_BYTE:
            return
        for block in reversed(ram.blocks):
            for page in reversed(range(block.page_count)):
                if received[block.name].test(page) and not block.is_zero(page * PAGE_BYTES, PAGE_BYTES):
                    byte = block.read(page * PAGE_BYTES + 8, 1)[0]
                    log.warning("x-fault flip-byte: page %d of '%s'", page, block.name)
                    block.write(page * PAGE_BYTES + 8, bytes([byte ^ 1]))
                    return
