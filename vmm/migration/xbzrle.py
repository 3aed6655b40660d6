"""~ XBZRLE: a page as its difference to what was sent before, in Python; and how the source's cache does.

    (bytes that stay uleb128, bytes that change uleb128, those bytes) ...    2 bytes of uleb128 at most

The bytes that stay at the end are left out; so the encoding of no difference is empty, and such a page is not
sent at all. An encoding of a page's length or more is no gain: the page goes whole. The twin of
`page_pump/xbzrle.c`, with which the tests compare it.

Sources: QEMU docs/xbzrle.txt, 7.2 migration/xbzrle.c, qapi/migration.json (XBZRLECacheStats).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmm.migration.errors import IllegalRecord
from vmm.migration.wire import PAGE_SIZE_BYTES

__all__ = ["XbzrleStats", "decode", "encode"]


def _uleb(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])


def _run(before: bytes, now: bytes, start: int, *, equal: bool) -> int:
    """How many bytes from `start` on are equal, or different."""
    end = start
    while end < PAGE_SIZE_BYTES and (before[end] == now[end]) == equal:
        end += 1
    return end - start


def encode(before: bytes, now: bytes) -> bytes | None:
    """What makes `now` of `before`; None if it would be no shorter than a page."""
    out, place = b"", 0
    while True:
        same = _run(before, now, place, equal=True)
        place += same
        if place == PAGE_SIZE_BYTES:
            return out
        changed = _run(before, now, place, equal=False)
        if len(out) + 4 + changed >= PAGE_SIZE_BYTES:
            return None
        out += _uleb(same) + _uleb(changed) + now[place : place + changed]
        place += changed


def decode(encoded: bytes, before: bytes) -> bytes:
    """The page that `encoded` makes of `before`; raises IllegalRecord if it would leave the page."""
    page, at, place = bytearray(before), 0, 0

    def number() -> int:
        nonlocal at
        value, length = encoded[at], 1
        if value >= 0x80:
            if encoded[at + 1] >= 0x80:
                raise IllegalRecord("XBZRLE length", offset=at, expected="14 bits", got="more")
            value, length = value & 0x7F | encoded[at + 1] << 7, 2
        at += length
        return value

    while at < len(encoded):
        first = at == 0
        try:
            same, changed = number(), number()
        except IndexError:
            raise IllegalRecord("XBZRLE length", offset=at, expected="a byte", got="the end") from None
        if (not same and not first) or not changed or place + same + changed > PAGE_SIZE_BYTES:
            got = f"{same} and {changed} bytes at {place}"
            raise IllegalRecord("XBZRLE run", offset=at, expected="one inside the page", got=got)
        if changed > len(encoded) - at:
            raise IllegalRecord("XBZRLE run", offset=at, expected=f"{changed} bytes", got=len(encoded) - at)
        place += same
        page[place : place + changed] = encoded[at : at + changed]
        place, at = place + changed, at + changed
    return bytes(page)


@dataclass(frozen=True)
class XbzrleStats:
    """How the source's cache does."""

    cache_size_bytes: int = 0
    asked: int = 0
    """Pages looked for in the cache."""
    misses: int = 0
    overflows: int = 0
    """Pages that would have got longer."""
    pages: int = 0
    """Sent as an encoding."""
    encoded_bytes: int = 0
    miss_rate: float = 0.0
    """Since the sync before the last one; so is the encoding rate."""
    encoding_rate: float = 0.0

    def since(self, then: XbzrleStats) -> XbzrleStats:
        """The same counters, with the rates since `then`."""
        asked, encoded = self.asked - then.asked, self.encoded_bytes - then.encoded_bytes
        saved = (self.pages - then.pages) * PAGE_SIZE_BYTES
        counters = (self.cache_size_bytes, self.asked, self.misses, self.overflows, self.pages)
        return XbzrleStats(
            *counters,
            self.encoded_bytes,
            (self.misses - then.misses) / asked if asked else 0.0,
            saved / encoded if encoded else 0.0,
        )

    def query(self) -> dict[str, Any]:
        """The object `xbzrle-cache`."""
        return {
            "cache-size": self.cache_size_bytes,
            "bytes": self.encoded_bytes,
            "pages": self.pages,
            "cache-miss": self.misses,
            "cache-miss-rate": self.miss_rate,
            "encoding-rate": self.encoding_rate,
            "overflow": self.overflows,
        }
