"""The checksum of a page record, by the processor's instruction where it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.migration.page_pump.native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.migration.bitmap import Bitmap

__all__ = ["checksum", "checksum_portable", "digest"]


def checksum(name: str, word: int, content: bytes) -> int:
    """As `vmm.migration.checksum.checksum`."""
    return int(lib.pp_checksum(name.encode(), word, content, len(content)))


def checksum_portable(name: str, word: int, content: bytes) -> int:
    """The same without the instruction."""
    return int(lib.pp_checksum_portable(name.encode(), word, content, len(content)))


def digest(maps: Mapping[str, Bitmap]) -> int:
    """Of page maps by RAMBlock, in any order: two sides that agree have the same."""
    result = 0
    for name, bitmap in maps.items():
        words = ffi.cast("uint8_t *", bitmap.address)
        result ^= int(lib.pp_checksum(name.encode(), bitmap.pages, words, bitmap.words * 8))
    return result
