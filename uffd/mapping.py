"""`Mapping`: memory at a fixed address, touched only by C with the GIL released.

A touch of a page that is missing waits until it is placed. A thread that waited with the GIL held would
stop the whole process, so there is no view of this memory, only copies in and out.

What "discard" means differs by kind (all tested, with a MISSING range):

    anonymous         DONTNEED drops the page
    memfd, shared     DONTNEED drops only the mapping of it; the page goes with a hole in the file
    memfd, private    a written page is the mapping's own, a read one the file's: DONTNEED, then a hole.
                      Reading a hole makes a page of zeroes in the file, which a later touch finds without
                      a fault: DONTNEED alone would not make it missing again.
"""

from __future__ import annotations

import enum
import os
from typing import Any

from uffd._native import PAGE_SIZE_BYTES, checked, ffi, lib
from uffd.errors import refused

__all__ = ["PAGE_SIZE_BYTES", "Mapping", "MappingKind"]

ALIGNMENT_BYTES = 2 << 20
"""Of the address: that of a huge page, which can then be used from the first byte on."""

MFD_NOEXEC_SEAL = 8
"""Linux 6.3; a kernel that knows it warns in its log if it is left out."""


class MappingKind(enum.Enum):
    """What the memory is made of."""

    ANONYMOUS = "anonymous"
    MEMFD_SHARED = "memfd, shared"
    MEMFD_PRIVATE = "memfd, private"


class Mapping:
    """`length` bytes at `address`, which never moves. Nothing is allocated before it is touched.

    Not in a fork's child (MADV_DONTFORK: it would see plain zeroes where pages are missing) and not in
    core dumps (they would wait for missing pages). Offsets and lengths are in bytes.
    """

    def __init__(self, length: int, kind: MappingKind = MappingKind.ANONYMOUS, *, name: str = "ram") -> None:
        """Raises OutOfMemory if so much address space or memory is not to be had, ValueError if
        `length` is not a positive number of whole pages. `name` shows in /proc for a memfd.
        """
        if length <= 0 or length % PAGE_SIZE_BYTES:
            raise ValueError(f"The length must be a positive multiple of {PAGE_SIZE_BYTES}, not {length}")
        self.length = length
        self.kind = kind
        self.fd: int | None = None if kind is MappingKind.ANONYMOUS else _memfd(name, length)
        shared = kind is MappingKind.MEMFD_SHARED
        address = ffi.new("uint64_t *")
        result = lib.memory_map(length, ALIGNMENT_BYTES, -1 if self.fd is None else self.fd, shared, address)
        if result < 0 and self.fd is not None:
            os.close(self.fd)
        checked(result, "mmap", 0, length)
        self.address: int = address[0]
        for advice in (lib.MADV_DONTFORK, lib.MADV_DONTDUMP):
            self._advise(0, length, advice, "madvise")

    def read(self, offset: int, length: int) -> bytes:
        """A copy of a range. Waits while a page of it is missing. Raises IndexError outside."""
        self._check(offset, length)
        copy = bytearray(length)
        self.read_into(offset, copy)
        return bytes(copy)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from `offset` on; as `read`."""
        self._check(offset, len(buffer))
        # The buffer is held by the handle until the call is over.
        with ffi.from_buffer(buffer, require_writable=True) as target:
            lib.memory_read(target, self.address + offset, len(buffer))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`. Waits while a page of the range is missing. Raises IndexError outside."""
        with ffi.from_buffer(data) as source:
            length = len(source)
            self._check(offset, length)
            lib.memory_write(self.address + offset, source, length)

    def fill(self, offset: int, length: int, value: int) -> None:
        """Store `length` times the byte `value`."""
        self._check(offset, length)
        lib.memory_fill(self.address + offset, value, length)

    def is_equal(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether the range from `offset` on holds `data`."""
        with ffi.from_buffer(data) as other:
            self._check(offset, len(other))
            return bool(lib.memory_is_equal(self.address + offset, other, len(other)))

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether a range holds zeroes only."""
        self._check(offset, length)
        return bool(lib.memory_is_zero(self.address + offset, length))

    def discard(self, offset: int, length: int) -> None:
        """Give the pages of a range back: they read as zeroes, or are missing where that is registered.

        Raises ValueError if the range is not whole pages.
        """
        self._check_pages(offset, length)
        if length == 0:
            return
        self._advise(offset, length, lib.MADV_DONTNEED, "MADV_DONTNEED")
        if self.fd is not None:
            checked(lib.memory_punch_hole(self.fd, offset, length), "fallocate", offset, length)

    def find_data(self, offset: int, length: int, bitmap: int) -> int:
        """OR the pages of a range that exist in the memfd into the bitmap at that address; the number
        of new bits. Pages of a private mapping's own are not among them, see `PagemapScanner`.
        """
        self._check_pages(offset, length)
        if self.fd is None:
            raise ValueError("Anonymous memory has no file to look in")
        return checked(lib.memory_find_data(self.fd, offset, length, bitmap), "lseek", offset, length)

    def use_huge_pages(self, wanted: bool) -> None:
        """Ask for transparent huge pages on a touch, or rule them out. A kernel without them ignores it.

        Off before pages are placed one by one, and for a range that must be missing page by page.
        """
        advice = lib.MADV_HUGEPAGE if wanted else lib.MADV_NOHUGEPAGE
        lib.memory_advise(self.address, self.length, advice)

    def populate_for_reading(self) -> None:
        """Map every page that does not exist to the shared page of zeroes (Linux 5.14)."""
        self._advise(0, self.length, lib.MADV_POPULATE_READ, "MADV_POPULATE_READ")

    def close(self) -> None:
        """Unmap; a second call does nothing. No other thread may be in any call of this object."""
        if self.address:
            checked(lib.memory_unmap(self.address, self.length), "munmap", self.address, self.length)
            self.address = 0
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _advise(self, offset: int, length: int, advice: Any, operation: str) -> None:
        address = self.address + offset
        checked(lib.memory_advise(address, length, advice), operation, address, length)

    def _check(self, offset: int, length: int) -> None:
        # What keeps C inside the mapping: every address that leaves this class went through here.
        if not self.address:
            raise ValueError("The mapping is closed")
        if offset < 0 or length < 0 or offset + length > self.length:
            raise IndexError(f"{length} bytes at {offset:#x} are not inside of {self.length:#x} bytes")

    def _check_pages(self, offset: int, length: int) -> None:
        self._check(offset, length)
        if offset % PAGE_SIZE_BYTES or length % PAGE_SIZE_BYTES:
            raise ValueError(f"{length} bytes at {offset:#x} are not whole pages")


def _memfd(name: str, length: int) -> int:
    """A memfd of `length` bytes, all hole."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | MFD_NOEXEC_SEAL)
    except OSError:
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)  # before Linux 6.3
        except OSError as error:
            raise refused("memfd_create", error.errno, 0, length) from error
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        os.close(fd)
        raise refused("ftruncate", error.errno, 0, length) from error
    return fd
