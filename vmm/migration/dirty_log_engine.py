"""The rung of the dirty log that the CPU engine keeps: it sees every guest store, the marks all others."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Protocol

from uffd import PAGE_SIZE_BYTES, UffdError
from vmm.errors import CpuError
from vmm.migration.bitmap import Bitmap
from vmm.migration.dirty_log_marks import DirtyLogError, Marks
from vmm.ram import GuestRam, RAMBlock, Region

__all__ = ["CpuLog", "EngineDirtyLog"]

logger = logging.getLogger(__name__)

PAGES_PER_WORD = 64


class CpuLog(Protocol):
    """What the CPU engine must offer. Each call may raise CpuError."""

    def start_log(self) -> None:
        """Log stores from now on, with an empty log."""

    def collect_log(self, guest_address: int, bitmap_address: int, pages: int) -> int:
        """OR the pages stored to since the last time into the bitmap, bit 0 being the page at
        `guest_address`; how many bits are new there. Afterwards they count as not stored to."""

    def stop_log(self) -> None:
        """Log no more."""


class EngineDirtyLog:
    """The engine's store log. All methods but `mark` belong to one thread."""

    rung = "engine"

    def __init__(self, ram: GuestRam, passed_over: Mapping[str, str], cpu_log: CpuLog) -> None:
        self.passed_over = dict(passed_over)
        self._ram = ram
        self._cpu_log = cpu_log
        self._marks = Marks(ram)
        self._undo = contextlib.ExitStack()
        self._is_running = False

    def start(self) -> dict[str, Bitmap]:
        """Arm the log; the pages of each block that may hold anything but zeroes. Raises DirtyLogError."""
        if self._is_running:
            raise DirtyLogError("The dirty log is running already")
        with _engine_errors("started"), contextlib.ExitStack() as undo:
            self._marks.attach()
            undo.callback(self._marks.detach)
            self._cpu_log.start_log()
            undo.callback(self._cpu_log.stop_log)
            populated = {block.name: _find_populated(block) for block in self._ram.blocks}
            self._undo = undo.pop_all()
        self._is_running = True
        return populated

    def sync(self, dirty: Mapping[str, Bitmap]) -> int:
        """OR the pages written since the last time into `dirty`; how many bits are new there.

        Raises DirtyLogError if the log is not running or failed, ValueError for bitmaps that do not fit.
        """
        if not self._is_running:
            raise DirtyLogError("The dirty log is not running")
        self._marks.check(dirty)
        with _engine_errors("synced"):
            return self._marks.take(dirty) + sum(
                self._collect(region, dirty[region.block.name]) for region in self._ram.map
            )

    def mark(self, block_name: str, first_page: int, page_count: int) -> None:
        """Count pages as written at the next sync. Any thread. Raises IndexError outside of the block."""
        self._marks.mark(block_name, first_page, page_count)

    def stop(self) -> None:
        """Log no more; a second call does nothing. Raises DirtyLogError if the engine did not let go."""
        self._is_running = False
        with _engine_errors("stopped"):
            self._undo.close()

    def _collect(self, region: Region, dirty: Bitmap) -> int:
        first, pages = region.offset // PAGE_SIZE_BYTES, region.length // PAGE_SIZE_BYTES
        if first % PAGES_PER_WORD == 0:
            address = dirty.address + first // PAGES_PER_WORD * 8
            return self._cpu_log.collect_log(region.guest_address, address, pages)
        # A region that begins in the middle of a word of the block's bitmap: only odd RAM sizes.
        part = Bitmap(pages)
        self._cpu_log.collect_log(region.guest_address, part.address, pages)
        before = dirty.count()
        for start, count in part.runs():
            dirty.set_range(first + start, count)
        return dirty.count() - before


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    try:
        yield
    except CpuError as error:
        raise DirtyLogError(f"The engine's store log could not be {what}: {error}") from error


def _find_populated(block: RAMBlock) -> Bitmap:
    populated = Bitmap(block.page_count)
    try:
        block.find_populated(populated.address)
    except UffdError as error:
        logger.warning("All of RAMBlock '%s' counts as populated: %s", block.name, error)
        populated.fill(True)
    return populated
