"""Which pages of this process exist, and which were written since they were last protected.

Two ways to ask the kernel: the PAGEMAP_SCAN ioctl (Linux 6.7, skips holes), and one 64-bit entry a
page from /proc/self/pagemap. Answers are OR'ed by C into a bitmap of the caller, given by address.
Sources: Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c.
"""

from __future__ import annotations

import errno
import pathlib

from uffd._native import checked, lib
from uffd.errors import UffdUnavailable

__all__ = ["PagemapScanner", "is_swap_configured"]

ENTRY_PRESENT = 1 << 63
ENTRY_SWAPPED = 1 << 62


def is_swap_configured(swaps: pathlib.Path = pathlib.Path("/proc/swaps")) -> bool:
    """Whether the host can swap; also True if that cannot be found out."""
    try:
        return len(swaps.read_text().splitlines()) > 1
    except OSError:
        return True


class PagemapScanner:
    """The pagemap of this process. It stays the pagemap of its opener after a fork: open it late.

    In all calls `address` and `length` are a range in bytes, whole pages; `bitmap` is the address of
    uint64 words whose bit 0 stands for the first page of the range. Each returns how many bits are new.
    """

    def __init__(self) -> None:
        """Raises UffdUnavailable if /proc/self/pagemap cannot be opened."""
        fd = lib.pagemap_open()
        if fd < 0:
            name = errno.errorcode.get(-fd, str(-fd))
            raise UffdUnavailable(
                f"/proc/self/pagemap cannot be opened ({name}); mount /proc, and do not make the process "
                "undumpable"
            )
        self.fd: int = fd

    def take_written(self, address: int, length: int, bitmap: int, known: int = 0) -> int:
        """The pages written since they were last protected, protecting each again in the same step.

        The range must be registered for WP with the feature WP_ASYNC. A page that was never protected
        and exists counts as written, so the first call on anonymous memory arms the range and gives its
        populated pages, with no moment in between. Pages that do not exist are not looked at.

        A page that is read for the first time begins to exist. To tell these from written ones in anonymous
        memory, give the address of a second bitmap in `known`, empty at first and the same in each call: it
        collects all that was reported, and a page outside of it that holds the kernel's page of zeroes is
        left out. (A huge page of zeroes may be reported by kernels that do not recognise it.)

        Raises NotRegistered if any of the range is not registered so; without the flag behind that, the
        kernel would call such a range clean.
        """
        flags = lib.PM_SCAN_WP_MATCHING | lib.PM_SCAN_CHECK_WPASYNC
        return self._scan(address, length, flags, bitmap, known)

    def peek_written(self, address: int, length: int, bitmap: int) -> int:
        """As `take_written`, without protecting anything."""
        return self._scan(address, length, lib.PM_SCAN_CHECK_WPASYNC, bitmap, 0)

    def find_populated(self, address: int, length: int, bitmap: int, *, swapped: bool = True) -> int:
        """The pages that are present or, if `swapped`, swapped out.

        A page that was protected before it existed has a marker in the page table, which looks swapped.
        """
        any_of = lib.PAGE_IS_PRESENT | (lib.PAGE_IS_SWAPPED if swapped else 0)
        result = lib.pagemap_scan(self.fd, address, length, 0, 0, any_of, bitmap, 0)
        if result in (-errno.ENOTTY, -errno.EINVAL):  # before Linux 6.7
            return self.read_populated(address, length, bitmap, swapped=swapped)
        return checked(result, "PAGEMAP_SCAN", address, length)

    def read_populated(self, address: int, length: int, bitmap: int, *, swapped: bool = True) -> int:
        """As `find_populated`, on any kernel: reads 8 bytes for every page."""
        entry = ENTRY_PRESENT | (ENTRY_SWAPPED if swapped else 0)
        result = lib.pagemap_read(self.fd, address, length, entry, bitmap)
        return checked(result, "read of the pagemap", address, length)

    def close(self) -> None:
        """Give up the descriptor; a second call does nothing."""
        if self.fd >= 0:
            lib.uffd_close(self.fd)
        self.fd = -1

    def _scan(self, address: int, length: int, flags: int, bitmap: int, known: int) -> int:
        mask, any_of = lib.PAGE_IS_WRITTEN, lib.PAGE_IS_PRESENT | lib.PAGE_IS_SWAPPED
        result = lib.pagemap_scan(self.fd, address, length, flags, mask, any_of, bitmap, known)
        return checked(result, "PAGEMAP_SCAN", address, length)
