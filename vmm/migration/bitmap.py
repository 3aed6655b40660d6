"""A bitmap of guest pages, in memory that C may write too.

Bit i of 64-bit word i // 64 is page i; bits beyond the last page are never set. The words lie in C memory at
a fixed address, so that a pagemap scan or the page pump can work on the same map without a copy; whoever
hands out `address` keeps the Bitmap alive meanwhile. Its plain twin, a set of page numbers, is in its test.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmm.migration.page_pump.native import ffi, lib

__all__ = ["Bitmap"]


class Bitmap:
    """`pages` bits, all clear at first.

    Methods that take a page or a range raise IndexError when it lies outside the map: a bit that is silently
    dropped would be a lost page.
    """

    __slots__ = ("_data", "address", "pages", "words")

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"A bitmap needs at least one page, not {pages}")
        self.pages = pages
        self.words = (pages + 63) // 64
        self._data = ffi.new("uint64_t[]", self.words)
        self.address = int(ffi.cast("uintptr_t", self._data))

    def _check(self, first: int, count: int = 1) -> None:
        if first < 0 or count < 0 or first + count > self.pages:
            raise IndexError(f"Pages {first}..{first + count - 1} are outside a bitmap of {self.pages}")

    def _same_size(self, other: Bitmap) -> None:
        if other.pages != self.pages:
            raise ValueError(f"Bitmaps of {self.pages} and {other.pages} pages cannot be combined")

    def test(self, page: int) -> bool:
        """Is the bit of `page` set?"""
        self._check(page)
        return bool(self._data[page // 64] >> (page % 64) & 1)

    def set(self, page: int) -> None:
        """Set the bit of `page`."""
        self.set_range(page, 1)

    def clear(self, page: int) -> None:
        """Clear the bit of `page`."""
        self.clear_range(page, 1)

    def set_range(self, first: int, count: int) -> None:
        """Set `count` bits from `first` on."""
        self._check(first, count)
        lib.pp_bitmap_set_range(self._data, first, count)

    def clear_range(self, first: int, count: int) -> None:
        """Clear `count` bits from `first` on."""
        self._check(first, count)
        lib.pp_bitmap_clear_range(self._data, first, count)

    def fill(self, value: bool) -> None:
        """Set or clear all bits."""
        (self.set_range if value else self.clear_range)(0, self.pages)

    def count(self) -> int:
        """How many bits are set."""
        return int(lib.pp_bitmap_count(self._data, self.pages))

    def count_stretches(self, step: int) -> list[int]:
        """How many bits are set of each `step`; the last stretch may be shorter.

        One call whatever the size: each gives up the GIL, and a busy thread may keep it for a while.
        """
        if step < 1:
            raise ValueError(f"A stretch needs at least one page, not {step}")
        counts = ffi.new("uint64_t[]", -(-self.pages // step))
        lib.pp_bitmap_count_stretches(self._data, self.pages, step, counts)
        return list(counts)

    def find_next_set(self, start: int = 0) -> int | None:
        """The first page at or after `start` whose bit is set, or None."""
        return self._find(start, 1)

    def find_next_clear(self, start: int = 0) -> int | None:
        """The first page at or after `start` whose bit is clear, or None."""
        return self._find(start, 0)

    def _find(self, start: int, value: int) -> int | None:
        if start < 0:
            raise IndexError(f"Page {start} is outside a bitmap of {self.pages}")
        if start >= self.pages:
            return None
        found = int(lib.pp_bitmap_find(self._data, self.pages, start, value))
        return found if found < self.pages else None

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first page, page count) of each run of set bits, upward."""
        end: int = 0
        while (first := self.find_next_set(end)) is not None:
            following = self.find_next_clear(first)
            end = self.pages if following is None else following
            yield first, end - first

    def or_(self, other: Bitmap) -> None:
        """Set every bit that is set in `other`."""
        self._combine(other, lib.PP_OR)

    def and_(self, other: Bitmap) -> None:
        """Clear every bit that is clear in `other`."""
        self._combine(other, lib.PP_AND)

    def andnot(self, other: Bitmap) -> None:
        """Clear every bit that is set in `other`."""
        self._combine(other, lib.PP_ANDNOT)

    def ornot(self, other: Bitmap) -> None:
        """Set every bit that is clear in `other`."""
        self._combine(other, lib.PP_ORNOT)

    def _combine(self, other: Bitmap, operation: int) -> None:
        self._same_size(other)
        lib.pp_bitmap_combine(self._data, other._data, self.pages, operation)

    def pour(self, into: Bitmap, also: Bitmap) -> None:
        """Set every bit that is set here in both others, and clear it here."""
        self._same_size(into)
        self._same_size(also)
        lib.pp_bitmap_pour(self._data, into._data, also._data, self.pages)

    def copy(self) -> Bitmap:
        """A new map with the same bits."""
        result = Bitmap(self.pages)
        result.or_(self)
        return result

    def to_bytes(self) -> bytes:
        """Little-endian, 8 bytes a word: what RECV_BITMAP carries."""
        return bytes(ffi.buffer(self._data))

    @classmethod
    def from_bytes(cls, pages: int, data: bytes) -> Bitmap:
        """The map that `to_bytes` gave.

        Raises:
            ValueError: the length is not that of a map of `pages`, or a bit beyond the last page is set.
        """
        result = cls(pages)
        if len(data) != result.words * 8:
            raise ValueError(f"A bitmap of {pages} pages has {result.words * 8} bytes, not {len(data)}")
        if int.from_bytes(data, "little") >> pages:
            raise ValueError(f"A bit beyond page {pages - 1} is set")
        ffi.buffer(result._data)[:] = data
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitmap) and self.pages == other.pages and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"<Bitmap {self.count()} of {self.pages}>"
