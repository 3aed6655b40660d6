"""zstd by the system's library, for multifd: one stream for each channel, whole after each packet.

A module of its own, since ctypes is half a megabyte that hardly any migration needs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from vmm.migration.errors import IllegalRecord, MigrationError

__all__ = ["ZstdCompressor", "ZstdDecompressor", "find_library"]

_CONTINUE, _FLUSH = 0, 1  # ZSTD_EndDirective
_COMPRESSION_LEVEL: Final = 100  # ZSTD_cParameter


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t))


@functools.cache
def find_library() -> Any:
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


def _in(data: bytes) -> _Buffer:
    return _Buffer(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data), 0)


class ZstdCompressor:
    """Pages in, a packet's bytes out."""

    def __init__(self, level: int) -> None:
        self._library = find_library()
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


class ZstdDecompressor:
    """A packet's bytes in, its pages out."""

    def __init__(self) -> None:
        self._library = find_library()
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
