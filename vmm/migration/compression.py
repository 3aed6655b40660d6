"""zlib and zstd as multifd uses them: one stream for each channel, whole after each packet.

The pages of a packet are (de)compressed by one call, without the GIL; no packet gives more than its pages.
zstd is the system's library, found when it is wanted (`zstd.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from vmm.migration.errors import IllegalRecord

__all__ = ["compressor", "decompressor", "why_not"]


def why_not(method: str) -> str | None:
    """Why this host cannot do it."""
    if method == "zstd":
        try:
            from vmm.migration.zstd import find_library

            find_library()
        except OSError as error:
            return f"libzstd.so.1 cannot be loaded: {error}"
    return None


def _zlib_compressor(level: int) -> Callable[[bytes], bytes]:
    stream = zlib.compressobj(level)
    return lambda data: stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)


def _zlib_decompressor() -> Callable[[bytes, int], bytes]:
    stream = zlib.decompressobj()

    def decompress(data: bytes, size: int) -> bytes:
        try:
            pages = stream.decompress(data, size)
            more = stream.decompress(stream.unconsumed_tail, 1) if stream.unconsumed_tail else b""
        except zlib.error as error:
            raise IllegalRecord("multifd zlib stream", expected="a packet's pages", got=error) from error
        if len(pages) != size or more or stream.unconsumed_tail or stream.eof:
            got = f"{len(pages) + len(more)} bytes" + (", and its end" if stream.eof else " or more")
            raise IllegalRecord("multifd zlib stream", expected=f"{size} bytes", got=got)
        return pages

    return decompress


def compressor(method: str, level: int) -> Callable[[bytes], bytes]:
    """Pages in, a packet's bytes out; for one channel. Raises OSError, see `why_not`."""
    if method == "zstd":
        from vmm.migration.zstd import ZstdCompressor

        return ZstdCompressor(level)
    return _zlib_compressor(level)


def decompressor(method: str) -> Callable[[bytes, int], bytes]:
    """A packet's bytes and the size of its pages in, the pages out; raises IllegalRecord. For one channel."""
    if method == "zstd":
        from vmm.migration.zstd import ZstdDecompressor

        return ZstdDecompressor()
    return _zlib_decompressor()
