"""The two rungs of the dirty log that the kernel keeps for us by write-protecting guest RAM.

What a page goes through, and why no write is lost:

    async   take_written reports and protects a written page under the page table's lock. The first write
            after it clears the protection in the kernel, nobody waits. In anonymous memory a page that does
            not exist carries no protection: once written, it exists and counts as written. In a memfd all
            pages are protected, because one that was only read could not be told from a written one there.
    sync    every page is protected, also those that do not exist. The first write waits until the loop
            of uffd.ProtectLog has set its bit and let it go on.

The populated set must not have a gap to the log: a page that is touched while the log starts must be in one
of the two. So async takes it from the scan that arms; and what is asked apart (the data of a memfd, the
pages that are present) is asked after the log is armed.

Where an armed page would lose its state, the rung is not used (`why_not`): a page of a shared memfd that is
swapped out leaves nothing in the page table that tells whether it was written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from uffd import Features, Mode, PagemapScanner, ProtectLog, UffdError, Userfaultfd, is_swap_configured, probe
from vmm.migration.bitmap import Bitmap
from vmm.migration.dirty_log_marks import DirtyLogError, Marks
from vmm.ram import GuestRam, RAMBlock, RamKind

__all__ = ["AsyncDirtyLog", "SyncDirtyLog"]

ASYNC_FEATURES = (
    Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.WP_UNPOPULATED | Features.WP_ASYNC
)
SYNC_FEATURES = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM


class AsyncDirtyLog:
    """WP_ASYNC and PAGEMAP_SCAN (Linux 6.7). All methods but `mark` belong to one thread."""

    rung = "async"

    def __init__(self, ram: GuestRam, passed_over: Mapping[str, str]) -> None:
        self.passed_over = dict(passed_over)
        self._ram = ram
        self._marks = Marks(ram)
        self._undo = contextlib.ExitStack()
        self._scanner: PagemapScanner | None = None
        self._known = {block.name: Bitmap(block.page_count) for block in ram.blocks}

    @staticmethod
    def why_not(ram: GuestRam) -> str | None:
        """Why this rung cannot be used here, with the cure; None if it can."""
        if is_swap_configured() and any(block.kind is RamKind.MEMFD_SHARED for block in ram.blocks):
            return (
                "The written state of a shared memfd is lost when it is swapped out; switch swap off or use "
                "the rung 'sync'"
            )
        return probe().why_no_wp_async

    def start(self) -> dict[str, Bitmap]:
        """Arm the log; the pages of each block that may hold anything but zeroes.

        Raises DirtyLogError, with nothing registered, e.g. if another userfaultfd has the range (EBUSY).
        """
        if self._scanner is not None:
            raise DirtyLogError("The dirty log is running already")
        with _undone_on_error(self._undo, self.rung):
            userfaultfd = Userfaultfd(ASYNC_FEATURES)
            self._undo.callback(userfaultfd.close)
            scanner = PagemapScanner()
            self._undo.callback(scanner.close)
            self._marks.attach()
            self._undo.callback(self._marks.detach)
            _register(userfaultfd, self._ram, self._undo)
            populated = {block.name: self._arm(userfaultfd, scanner, block) for block in self._ram.blocks}
            self._scanner = scanner
        return populated

    def sync(self, dirty: Mapping[str, Bitmap]) -> int:
        """OR the pages written since the last time into `dirty`; how many bits are new there.

        Raises DirtyLogError if the log is not running or failed, ValueError for bitmaps that do not fit.
        """
        if self._scanner is None:
            raise DirtyLogError("The dirty log is not running")
        self._marks.check(dirty)
        fresh = self._marks.take(dirty)
        for block in self._ram.blocks:
            try:
                fresh += self._take_written(self._scanner, block, dirty[block.name])
            except UffdError as error:
                raise DirtyLogError(f"The dirty log of RAMBlock '{block.name}' failed: {error}") from error
        return fresh

    def mark(self, block_name: str, first_page: int, page_count: int) -> None:
        """Count pages as written at the next sync. Any thread. Raises IndexError outside of the block."""
        self._marks.mark(block_name, first_page, page_count)

    def stop(self) -> None:
        """Unregister everything; a second call does nothing."""
        self._scanner = None
        self._undo.close()

    def _arm(self, userfaultfd: Userfaultfd, scanner: PagemapScanner, block: RAMBlock) -> Bitmap:
        populated = Bitmap(block.page_count)
        self._known[block.name].fill(False)
        self._take_written(scanner, block, populated)
        if block.kind is not RamKind.ANONYMOUS:
            # A page that is first written between these calls is in the third one's answer.
            userfaultfd.protect(block.host_address, block.length_bytes)
            block.find_file_data(populated.address)
        return populated

    def _take_written(self, scanner: PagemapScanner, block: RAMBlock, bitmap: Bitmap) -> int:
        return scanner.take_written(
            block.host_address, block.length_bytes, bitmap.address, self._known[block.name].address
        )


class SyncDirtyLog:
    """Write-protect faults (Linux 5.19). All methods but `mark` belong to one thread."""

    rung = "sync"

    def __init__(
        self, ram: GuestRam, passed_over: Mapping[str, str], *, features: Features | None = None
    ) -> None:
        """`features`: take the kernel for one that has just these (for tests)."""
        known = Features(probe().features & int(Features.WP_UNPOPULATED)) if features is None else features
        self.passed_over = dict(passed_over)
        self._features = SYNC_FEATURES | known
        self._ram = ram
        self._marks = Marks(ram)
        self._undo = contextlib.ExitStack()
        self._log: ProtectLog | None = None
        self._numbers: dict[str, int] = {}

    @staticmethod
    def why_not(_ram: GuestRam) -> str | None:
        """Why this rung cannot be used here, with the cure; None if it can."""
        return probe().why_no_wp_sync

    @property
    def fault_count(self) -> int:
        """How many writes have waited for the log since `start`."""
        return 0 if self._log is None else self._log.fault_count

    def start(self) -> dict[str, Bitmap]:
        """As `AsyncDirtyLog.start`."""
        if self._log is not None:
            raise DirtyLogError("The dirty log is running already")
        with _undone_on_error(self._undo, self.rung):
            userfaultfd = Userfaultfd(self._features)
            self._undo.callback(userfaultfd.close)
            self._marks.attach()
            self._undo.callback(self._marks.detach)
            log = ProtectLog(userfaultfd, len(self._ram.blocks))
            self._undo.callback(log.stop)
            for block in self._ram.blocks:
                self._numbers[block.name] = log.add(block.host_address, block.page_count)
            _register(userfaultfd, self._ram, self._undo)
            log.start("mig/dirty-log")
            for block in self._ram.blocks:
                self._protect(userfaultfd, block)
            populated = {block.name: self._find_populated(block) for block in self._ram.blocks}
            self._log = log
        return populated

    def sync(self, dirty: Mapping[str, Bitmap]) -> int:
        """As `AsyncDirtyLog.sync`."""
        if self._log is None:
            raise DirtyLogError("The dirty log is not running")
        self._marks.check(dirty)
        fresh = self._marks.take(dirty)
        for name, number in self._numbers.items():
            try:
                fresh += self._log.collect(number, dirty[name].address)
            except UffdError as error:
                raise DirtyLogError(f"The dirty log of RAMBlock '{name}' failed: {error}") from error
        return fresh

    def mark(self, block_name: str, first_page: int, page_count: int) -> None:
        """As `AsyncDirtyLog.mark`."""
        self._marks.mark(block_name, first_page, page_count)

    def stop(self) -> None:
        """As `AsyncDirtyLog.stop`. Raises DirtyLogError, with all undone, if the fault loop had failed."""
        self._log = None
        try:
            self._undo.close()
        except UffdError as error:
            raise DirtyLogError(f"The dirty log ended badly: {error}") from error

    def _protect(self, userfaultfd: Userfaultfd, block: RAMBlock) -> None:
        if block.kind is RamKind.ANONYMOUS and not self._features & Features.WP_UNPOPULATED:
            # Before Linux 6.4 a page that does not exist cannot be protected, so let all of them exist.
            block.populate_for_reading()
        userfaultfd.protect(block.host_address, block.length_bytes)

    @staticmethod
    def _find_populated(block: RAMBlock) -> Bitmap:
        populated = Bitmap(block.page_count)
        if block.kind is not RamKind.ANONYMOUS:
            block.find_file_data(populated.address)
        if block.kind is RamKind.MEMFD_SHARED:
            return populated
        # The mark of a protected page that does not exist looks as if it were swapped out. So "present" is
        # the whole truth if nothing can be swapped out, and otherwise there is none to be had.
        if is_swap_configured():
            populated.fill(True)
            return populated
        scanner = PagemapScanner()
        try:
            scanner.find_populated(block.host_address, block.length_bytes, populated.address, swapped=False)
        finally:
            scanner.close()
        return populated


def _register(userfaultfd: Userfaultfd, ram: GuestRam, undo: contextlib.ExitStack) -> None:
    for block in ram.blocks:
        userfaultfd.register(block.host_address, block.length_bytes, Mode.WP)
        undo.callback(userfaultfd.unregister, block.host_address, block.length_bytes)


@contextlib.contextmanager
def _undone_on_error(undo: contextlib.ExitStack, rung: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        undo.close()
        if isinstance(error, UffdError):
            raise DirtyLogError(f"The dirty log ({rung}) cannot be started: {error}") from error
        raise
