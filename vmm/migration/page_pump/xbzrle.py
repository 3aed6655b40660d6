"""The source's cache of sent pages, and which pages of one outgoing migration go through it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from vmm.migration.page_pump.native import check, ffi, lib
from vmm.migration.params import Capability
from vmm.migration.xbzrle import XbzrleStats

if TYPE_CHECKING:
    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.params import Capabilities, Parameters
    from vmm.migration.stats import MigrationStats

__all__ = ["XbzrleCache", "XbzrleSource"]


class XbzrleCache:
    """Up to `size_bytes` of pages as the destination has them; memory is taken as it is needed."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.struct = ffi.new("struct pp_xbzrle *")
        check(lib.pp_xbzrle_init(self.struct, size_bytes), "Cannot allocate the XBZRLE cache")
        self.close = weakref.finalize(self, lib.pp_xbzrle_free, self.struct)
        """Frees the cache, at the latest with the last reference. Nobody may be sending any more."""

    def stats(self) -> XbzrleStats:
        """The counters so far."""
        x = self.struct
        counters = (x.asked, x.misses, x.overflows, x.sent_pages, x.sent_bytes)
        return XbzrleStats(self.size_bytes, *map(int, counters))


class XbzrleSource:
    """The capability xbzrle of one outgoing migration; does nothing without it. (mig/source)

    As in QEMU the first pass goes past the cache: what is not written again need not be kept.
    """

    def __init__(
        self, sender: PageSender, capabilities: Capabilities, parameters: Parameters, stats: MigrationStats
    ) -> None:
        self._is_on = capabilities[Capability.XBZRLE] and not capabilities[Capability.MULTIFD]
        self._sender = sender
        self._parameters = parameters
        self._stats = stats
        self._cache: XbzrleCache | None = None
        self._before = XbzrleStats()  # as of caches of other sizes
        self._at_sync = XbzrleStats()
        if capabilities[Capability.XBZRLE]:
            stats.set_xbzrle(XbzrleStats(parameters["xbzrle-cache-size"]))

    def synced(self) -> None:
        """A bitmap sync of precopy; the parameter xbzrle-cache-size takes effect here. Raises OSError."""
        if not self._is_on:
            return
        size_bytes = self._parameters["xbzrle-cache-size"]
        if self._cache is None or self._cache.size_bytes != size_bytes:
            self._before = self._totals()
            self._cache = XbzrleCache(size_bytes)
            self._sender.struct.xbzrle = self._cache.struct
        self._cache.struct.age += 1
        totals = self._totals()
        self._stats.set_xbzrle(totals.since(self._at_sync))
        self._at_sync = totals

    def _totals(self) -> XbzrleStats:
        now, before = self._cache.stats() if self._cache else XbzrleStats(), self._before
        return replace(
            now,
            asked=now.asked + before.asked,
            misses=now.misses + before.misses,
            overflows=now.overflows + before.overflows,
            pages=now.pages + before.pages,
            encoded_bytes=now.encoded_bytes + before.encoded_bytes,
        )

    def end(self) -> None:
        """Precopy is over: in postcopy every page goes whole."""
        if self._cache is not None:
            self._stats.set_xbzrle(self._totals().since(self._at_sync))
        self._is_on = False
        self._sender.struct.xbzrle = ffi.NULL
