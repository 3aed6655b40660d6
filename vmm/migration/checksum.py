"""The checksum of a page record, said plainly: the Python twin of page_pump/checksum.c.

    seed   CRC32C over name | be64 (offset | kind) | the content's last length % 32 bytes
    lanes  CRC32C over every fourth 8-byte word of the rest: A from seed, B from ~seed, C and D from all ones
    sum    (A << 32 | B) * K1 ^ rotate((C << 32 | D) * K2, 32)          modulo 2^64; K1 and K2 are odd

The content is the whole page (that of an XBZRLE record after decoding), or the fill byte of a ZERO record.
What it detects, and why it has four lanes, the C file says.
"""

from __future__ import annotations

from typing import Final

__all__ = ["checksum"]

POLYNOMIAL: Final = 0x82F63B78
"""CRC32C (Castagnoli), reflected."""
K1: Final = 0x9E3779B97F4A7C15
K2: Final = 0xC2B2AE3D27D4EB4F
ONES: Final = 0xFFFFFFFF
WORDS: Final = (1 << 64) - 1
STRIDE: Final = 32


def _table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


TABLE: Final = _table()


def crc32c(data: bytes, crc: int = ONES) -> int:
    """Without the inversion at the end: what the processor's instruction goes on with."""
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc


def checksum(name: str, word: int, content: bytes) -> int:
    """The 64 bits behind a page record of RAMBlock `name`; `word` = offset in bytes | the record's kind."""
    whole = len(content) - len(content) % STRIDE
    seed = crc32c(name.encode() + word.to_bytes(8, "big") + content[whole:])
    lanes = [bytearray() for _ in range(4)]
    for at in range(0, whole, 8):
        lanes[at // 8 % 4] += content[at : at + 8]
    a, b, c, d = map(crc32c, map(bytes, lanes), (seed, seed ^ ONES, ONES, ONES))
    x, y = (a << 32 | b) * K1 & WORDS, (c << 32 | d) * K2 & WORDS
    return x ^ (y << 32 & WORDS | y >> 32)
