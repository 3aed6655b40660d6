"""The kernel as a witness: which pages of this process were written, whoever wrote them and by whatever way.

Asynchronous write-protection and PAGEMAP_SCAN, beside the log that is on trial and knowing nothing of it:
what the kernel has seen written and the log has not is a lost page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from tests.support.requires import requires
from uffd import Features, Mode, PagemapScanner, Userfaultfd
from vmm.migration.bitmap import Bitmap

__all__ = ["KernelWitness", "pages_of"]

FEATURES = Features.PAGEFAULT_FLAG_WP | Features.WP_UNPOPULATED | Features.WP_ASYNC
PAGE = 4096


def pages_of(bitmap: Bitmap) -> list[int]:
    """The numbers of the bits that are set."""
    return [first + i for first, count in bitmap.runs() for i in range(count)]


class KernelWitness:
    """Watches private anonymous memory; skips the test where the kernel cannot."""

    def __init__(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """`ranges`: name -> address and pages. What is written from now on is in the next answer."""
        requires("wp_async")
        self._ranges = dict(ranges)
        self._known = {name: Bitmap(pages) for name, (_, pages) in ranges.items()}
        with contextlib.ExitStack() as undo:
            userfaultfd = Userfaultfd(FEATURES)
            undo.callback(userfaultfd.close)
            self._scanner = PagemapScanner()
            undo.callback(self._scanner.close)
            for address, pages in ranges.values():
                userfaultfd.register(address, pages * PAGE, Mode.WP)
                undo.callback(userfaultfd.unregister, address, pages * PAGE)
            self.take()
            self._undo = undo.pop_all()

    def take(self) -> dict[str, Bitmap]:
        """The pages written since the last call."""
        written = {name: Bitmap(pages) for name, (_, pages) in self._ranges.items()}
        for name, (address, pages) in self._ranges.items():
            known = self._known[name].address
            self._scanner.take_written(address, pages * PAGE, written[name].address, known)
        return written

    def close(self) -> None:
        """Watch no more."""
        self._undo.close()
