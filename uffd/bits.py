"""Bits of a bitmap given by address, set by one thread while another takes them."""

from __future__ import annotations

from uffd._native import lib

__all__ = ["set_bits", "take_bits"]


def set_bits(bitmap: int, first: int, count: int) -> None:
    """Set `count` bits from `first` on; each 64-bit word at once."""
    lib.bits_set_atomic(bitmap, first, count)


def take_bits(source: int, target: int, word_count: int) -> int:
    """Move all set bits from one bitmap into another; how many are new there.

    `source` may be set by other threads meanwhile, `target` may not.
    """
    return int(lib.bits_take(source, target, word_count))
