"""Page bitmaps in memory that C may write, given by address."""

from __future__ import annotations

from typing import Any

from uffd._native import ffi, lib

__all__ = ["BitWords", "set_bits", "take_bits"]


class BitWords:
    """A bitmap of `bits` bits, all clear: 64-bit words at `address`, which live as long as this object."""

    def __init__(self, bits: int) -> None:
        self.word_count = (bits + 63) // 64
        self._words: Any = ffi.new("uint64_t[]", self.word_count)
        self.address = int(ffi.cast("uintptr_t", self._words))

    def word(self, index: int) -> int:
        """Bits 64 * index and up. Raises IndexError outside."""
        return int(self._words[index])


def set_bits(bitmap: int, first: int, count: int) -> None:
    """Set `count` bits from `first` on; each 64-bit word at once."""
    lib.bits_set_atomic(bitmap, first, count)


def take_bits(source: int, target: int, word_count: int) -> int:
    """Move all set bits from one bitmap into another; how many are new there.

    `source` may be set by other threads meanwhile, `target` may not.
    """
    return int(lib.bits_take(source, target, word_count))
