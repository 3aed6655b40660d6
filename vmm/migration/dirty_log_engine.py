"""The rung of the dirty log that the CPU engine keeps: it sees every guest store, the marks all others.

Nothing is write-protected: guest RAM keeps its huge pages, no page table is walked, and a sync costs what was
written. That is why it must be sure of two things which the kernel sees by itself: every way in which the
engine stores (vmm/cpu/store_log.c), and every write of the VMM (`vmm.ram` is the only way). The kernel bears
witness to both in tests/vmm/migration/test_dirty_log_witness.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from uffd import PAGE_SIZE_BYTES, UffdError
from vmm.errors import CpuError
from vmm.migration.bitmap import Bitmap
from vmm.migration.dirty_log_marks import DirtyLogError, Marks
from vmm.ram import GuestRam, RAMBlock

__all__ = ["CpuLog", "EngineDirtyLog"]

logger = logging.getLogger(__name__)


class CpuLog(Protocol):
    """What the CPU engine must offer. Each call may raise CpuError."""

    def start_log(self) -> None:
        """Log stores from now on, with an empty log."""

    def aim_log(self, targets: Sequence[tuple[int, int, int, int]]) -> Any:
        """For `collect_log`: where the pages of each region of RAM go, upward.

        A target is a guest address, pages, the address of a bitmap, and which bit there is the first page.
        """

    def collect_log(self, targets: Any) -> int:
        """OR the pages stored to since the last time into the bitmaps that `aim_log` was told of; how many
        bits are new there. Afterwards they count as not stored to."""

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
        self._targets: Any = None
        self._aimed_at = [(block.name, Bitmap(1)) for block in ram.blocks]  # at none that anyone has

    def start(self) -> dict[str, Bitmap]:
        """Arm the log; the pages of each block that may hold anything but zeroes. Raises DirtyLogError."""
        if self._is_running:
            raise DirtyLogError("The dirty log is running already")
        with contextlib.ExitStack() as undo:
            self._marks.attach()
            undo.callback(self._marks.detach)
            try:
                self._cpu_log.start_log()
            except CpuError as error:
                raise _failed("started", error) from error
            undo.callback(self._cpu_log.stop_log)
            # After it: what is touched while this looks is in the log.
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
        for name, bitmap in self._aimed_at:
            if dirty.get(name) is not bitmap:
                self._aim(dirty)
                break
        fresh = self._marks.take(dirty)
        try:
            return fresh + self._cpu_log.collect_log(self._targets)
        except CpuError as error:
            raise _failed("synced", error) from error

    def mark(self, block_name: str, first_page: int, page_count: int) -> None:
        """Count pages as written at the next sync. Any thread. Raises IndexError outside of the block."""
        self._marks.mark(block_name, first_page, page_count)

    def stop(self) -> None:
        """Log no more; a second call does nothing. Raises DirtyLogError if the engine did not let go."""
        self._is_running = False
        try:
            self._undo.close()
        except CpuError as error:
            raise _failed("stopped", error) from error

    def _aim(self, dirty: Mapping[str, Bitmap]) -> None:
        """The engine writes to these bitmaps from now on; a sync that is given them again is short."""
        self._marks.check(dirty)
        self._targets = self._cpu_log.aim_log(
            [
                (
                    region.guest_address,
                    region.length // PAGE_SIZE_BYTES,
                    dirty[region.block.name].address,
                    region.offset // PAGE_SIZE_BYTES,
                )
                for region in self._ram.map
            ]
        )
        self._aimed_at = [(block.name, dirty[block.name]) for block in self._ram.blocks]


def _failed(what: str, error: CpuError) -> DirtyLogError:
    return DirtyLogError(f"The engine's store log could not be {what}: {error}")


def _find_populated(block: RAMBlock) -> Bitmap:
    populated = Bitmap(block.page_count)
    try:
        block.find_populated(populated.address)
    except UffdError as error:
        logger.warning("All of RAMBlock '%s' counts as populated: %s", block.name, error)
        populated.fill(True)
    return populated
