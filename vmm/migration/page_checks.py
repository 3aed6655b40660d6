"""x-page-checksums: each page goes with 64 bits over its RAMBlock, its offset and its content.

    source                                              destination
    PING hello ------------------------------------->   PONG answer: a Pageferry, see peer.py
    X_PAGE_CHECKSUMS algorithm --------------------->   from here on a page without a checksum is refused
    page records with the flag CHECKSUM ------------>   each is verified before it is placed
    discards, X_RECEIVED digest -------------------->   the received maps are what the source takes them for

Rules
1. Before the first page the peer has answered. One that has not, or cannot (`file:`, `exec:`), gets no
   checksums: stock QEMU dies of the flag. Then query-migrate says so, and why.
2. The guest may write to a page at any time: it is copied, and checksum and bytes are those of the copy.
3. A page that fails is not placed. In precopy the guest stays at the source; in postcopy the page stays
   missing and the migration is paused, and recovery sends it again.
4. What is agreed holds for the whole migration, over every channel of it.

What a checksum is, `checksum.py` says.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vmm.migration.bitmap import Bitmap
from vmm.migration.page_pump.checksums import digest
from vmm.migration.params import Capability
from vmm.migration.source_hand_over import INTRODUCTION_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.migration.page_pump.receiver import PageReceiver
    from vmm.migration.params import Capabilities
    from vmm.migration.source_return import ReturnPathThread
    from vmm.migration.source_stream import SourceStream

__all__ = ["PageChecks", "query_received"]

log = logging.getLogger(__name__)


class PageChecks:
    """The capability in one outgoing migration. (mig/source; `query` any thread)"""

    def __init__(self, stream: SourceStream, capabilities: Capabilities) -> None:
        self._stream = stream
        self._is_wanted = capabilities[Capability.X_PAGE_CHECKSUMS]
        self._why_not: str | None = "the destination has not said yet who it is"

    @property
    def is_on(self) -> bool:
        """Do pages go with checksums?"""
        return self._is_wanted and self._why_not is None

    def agree(self, return_path: ReturnPathThread | None, cancel_fd: int) -> None:
        """Before the first page. Raises as `ReturnPathThread.wait_introduced`."""
        if not self._is_wanted:
            return
        if return_path is None:
            self._why_not = "the transport is one-way: who reads cannot say whether he understands them"
        elif not return_path.wait_introduced(cancel_fd, INTRODUCTION_S):
            self._why_not = "the destination answers no PING"
        elif not return_path.peer_is_pageferry:
            self._why_not = "the destination is no Pageferry"
        else:
            self._why_not = None
            self._stream.checksum_pages()
        if self._why_not is not None:
            log.warning("pages go without checksums: %s", self._why_not)

    def confirm(self, discarded: Mapping[str, Bitmap]) -> None:
        """After the discards: the destination has all but `discarded`, by now. Raises OSError."""
        if not self.is_on:
            return
        received = {name: Bitmap(bitmap.pages) for name, bitmap in discarded.items()}
        for name, bitmap in received.items():
            bitmap.ornot(discarded[name])
        self._stream.received(digest(received))

    def query(self) -> dict[str, Any] | None:
        """The source's `x-page-checksums`, if they are wanted."""
        if not self._is_wanted:
            return None
        return {"state": True} if self._why_not is None else {"state": False, "reason": self._why_not}


def query_received(receiver: PageReceiver, capabilities: Capabilities) -> dict[str, Any] | None:
    """The destination's `x-page-checksums`, if they are wanted on either side."""
    if receiver.has_checksums:
        return {"state": True, "checked-pages": int(receiver.struct.checked_pages)}
    if not capabilities[Capability.X_PAGE_CHECKSUMS]:
        return None
    return {"state": False, "reason": "the source sends none"}
