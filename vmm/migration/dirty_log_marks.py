"""What the rungs of the dirty log share: their errors, and the marks for writes that the VMM makes itself.

MigrationError (vmm.errors)
 +- DirtyLogError         a log that was running failed; its writes are not known, the migration fails
 +- DirtyLogUnavailable   no rung, or not the one that was asked for; the text says the cure of each
"""

from __future__ import annotations

from collections.abc import Mapping

from uffd import PAGE_SIZE_BYTES, set_bits, take_bits
from vmm.errors import MigrationError
from vmm.migration.bitmap import Bitmap
from vmm.ram import GuestRam, RAMBlock

__all__ = ["DirtyLogError", "DirtyLogUnavailable", "Marks"]


class DirtyLogError(MigrationError):
    """The dirty log could not be started, or failed: writes may have been missed."""


class DirtyLogUnavailable(MigrationError):
    """No dirty log as asked for. `reasons` says why for each rung that was tried."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("No dirty log: " + "; ".join(f"{rung}: {why}" for rung, why in reasons.items()))
        self.reasons = dict(reasons)


class Marks:
    """Pages that the VMM wrote or discarded, a bit each, set from any thread.

    A discard leaves no trace in the kernel's log (the page is gone, not written), and the engine's log
    sees guest stores only.
    """

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._bitmaps = {block.name: Bitmap(block.page_count) for block in ram.blocks}
        self._is_used = False  # set behind a bit, cleared before the bits are taken

    def attach(self) -> None:
        """Hear of writes from now on."""
        self._ram.add_write_listener(self._on_write)

    def detach(self) -> None:
        """Hear of no more; a second call does nothing."""
        self._ram.remove_write_listener(self._on_write)

    def mark(self, block_name: str, first_page: int, page_count: int) -> None:
        """Mark pages. Raises IndexError if they are not all in the block, KeyError if there is none."""
        bitmap = self._bitmaps[block_name]
        if first_page < 0 or page_count < 0 or first_page + page_count > bitmap.pages:
            raise IndexError(
                f"{page_count} pages from {first_page} on are not inside of RAMBlock '{block_name}' "
                f"({bitmap.pages} pages)"
            )
        set_bits(bitmap.address, first_page, page_count)
        self._is_used = True

    def take(self, dirty: Mapping[str, Bitmap]) -> int:
        """Move the marks into `dirty`; how many bits are new there."""
        if not self._is_used:
            return 0
        self._is_used = False
        return sum(
            take_bits(marks.address, dirty[name].address, marks.words)
            for name, marks in self._bitmaps.items()
        )

    def check(self, dirty: Mapping[str, Bitmap]) -> None:
        """Raises ValueError if `dirty` does not have a bitmap of the right size for every block."""
        for name, marks in self._bitmaps.items():
            if name not in dirty or dirty[name].pages != marks.pages:
                raise ValueError(f"The dirty bitmaps lack one of {marks.pages} pages for RAMBlock '{name}'")

    def _on_write(self, block: RAMBlock, offset: int, length: int) -> None:
        first = offset // PAGE_SIZE_BYTES
        last = (offset + length - 1) // PAGE_SIZE_BYTES
        self.mark(block.name, first, last - first + 1)
