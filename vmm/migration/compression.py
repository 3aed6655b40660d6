"""zlib and zstd as multifd uses them: one stream for each channel, whole after each packet.

The pages of a packet are (de)compressed by one call, without the GIL; no packet gives more than its pages.
zstd is the system's library, found when it is wanted.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import zlib
from collections.abc import Callable
from typing import Any, Final

from vmm.migration.errors import IllegalRecord, MigrationError

__all__ = ["compressor", "decompressor", "why_not"]

_CONTINUE, _FLUSH = 0, 1  # ZSTD_EndDirective
_COMPRESSION_LEVEL: Final = 100  # ZSTD_cParameter


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t))


@functools.cache
def _zstd() -> Any:
    """The library; raises OSError."""
    library = ctypes.CDLL("libzstd.so.1")
    for name in ("ZSTD_createCCtx", "ZSTD_createDCtx"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("ZSTD_freeCCtx", "ZSTD_freeDCtx"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    pointer = ctypes.POINTER(_Buffer)
    library.ZSTD_compressStream2.argtypes = [ctypes.c_void_p, pointer, pointer, ctypes.c_int]
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, pointer, pointer]
    library.ZSTD_CCtx_setParameter.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    for name in ("compressStream2", "decompressStream", "compressBound"):
        getattr(library, f"ZSTD_{name}").restype = ctypes.c_size_t
    return library


def why_not(method: str) -> str | None:
    """Why this host cannot do it."""
    if method == "zstd":
        try:
            _zstd()
        except OSError as error:
            return f"libzstd.so.1 cannot be loaded: {error}"
    return None


def _in(data: bytes) -> _Buffer:
    return _Buffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)


class _ZstdCompressor:
    def __init__(self, level: int) -> None:
        self._library = _zstd()
        self._context = self._library.ZSTD_createCCtx()
        self._library.ZSTD_CCtx_setParameter(self._context, _COMPRESSION_LEVEL, level)

    def __del__(self) -> None:
        self._library.ZSTD_freeCCtx(self._context)

    def __call__(self, data: bytes) -> bytes:
        room = ctypes.create_string_buffer(self._library.ZSTD_compressBound(len(data)) + 1024)
        given, taken = _in(data), _Buffer(ctypes.addressof(room), len(room), 0)
        left = self._library.ZSTD_compressStream2(
            self._context, ctypes.byref(taken), ctypes.byref(given), _FLUSH
        )
        if left:
            raise MigrationError("zstd cannot compress a packet")
        return ctypes.string_at(room, taken.at)


class _ZstdDecompressor:
    def __init__(self) -> None:
        self._library = _zstd()
        self._context = self._library.ZSTD_createDCtx()

    def __del__(self) -> None:
        self._library.ZSTD_freeDCtx(self._context)

    def __call__(self, data: bytes, size: int) -> bytes:
        room = ctypes.create_string_buffer(size + 1)
        given, taken = _in(data), _Buffer(ctypes.addressof(room), len(room), 0)
        while given.at < given.size and taken.at <= size:
            result = self._library.ZSTD_decompressStream(
                self._context, ctypes.byref(taken), ctypes.byref(given)
            )
            if self._library.ZSTD_isError(result):
                raise IllegalRecord("multifd zstd stream", expected="a packet's pages", got="no zstd")
        if taken.at != size:
            got = f"{taken.at} bytes or more"
            raise IllegalRecord("multifd zstd stream", expected=f"{size} bytes", got=got)
        return ctypes.string_at(room, size)


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
    return _ZstdCompressor(level) if method == "zstd" else _zlib_compressor(level)


def decompressor(method: str) -> Callable[[bytes, int], bytes]:
    """A packet's bytes and the size of its pages in, the pages out; raises IllegalRecord. For one channel."""
    return _ZstdDecompressor() if method == "zstd" else _zlib_decompressor()
