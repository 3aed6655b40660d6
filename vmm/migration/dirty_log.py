"""The dirty log: which pages were written since the last bitmap sync, by the guest or by the VMM.

There are three ways to know, a ladder from the best down. Each is exact: no write is ever lost, and there is
no comparison of hashes. A page may be reported that was not written.

    rung     who watches                               a first write costs       needs
    engine   the CPU engine's own stores + marks       a slow store, 20 ns       an engine that keeps a log
    async    the kernel: WP_ASYNC + PAGEMAP_SCAN       a fault in the kernel     Linux 6.7
    sync     a native thread: write-protect faults     two thread switches       Linux 5.19, userfaultfd

The kernel's rungs split huge pages and walk the page table at each sync. They see every write of this
process, whoever makes it; `engine` relies on `vmm.ram` for those of the VMM.

A rung that cannot be used is logged with its reason and kept in `passed_over`, for query-migrate.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, Protocol

from vmm.migration.bitmap import Bitmap
from vmm.migration.dirty_log_engine import CpuLog, EngineDirtyLog
from vmm.migration.dirty_log_kernel import AsyncDirtyLog, SyncDirtyLog
from vmm.migration.dirty_log_marks import DirtyLogError, DirtyLogUnavailable
from vmm.ram import GuestRam

__all__ = ["RUNGS", "CpuLog", "DirtyLog", "DirtyLogError", "DirtyLogUnavailable", "Rung", "open_dirty_log"]

logger = logging.getLogger(__name__)

Rung = Literal["auto", "engine", "async", "sync"]

RUNGS: tuple[Rung, ...] = ("engine", "async", "sync")
"""The ladder, best first."""


class DirtyLog(Protocol):
    """One log, from `start` to `stop`. All methods but `mark` belong to one thread."""

    rung: str
    passed_over: dict[str, str]
    """Better rungs that were not used, each with the reason and the cure."""

    def start(self) -> dict[str, Bitmap]:
        """Arm the log. Returns for each block the populated set: pages outside of it were never touched
        and are zero; a page touched later is reported by `sync`.

        Raises DirtyLogError, with nothing left armed.
        """

    def sync(self, dirty: Mapping[str, Bitmap]) -> int:
        """OR the pages written since the last sync (since `start` for the first) into `dirty`, and watch them
        again; how many bits are new there. What a page holds is to be read after this.

        Nothing else may change `dirty` meanwhile. Raises DirtyLogError if writes may have been missed.
        """

    def mark(self, block_name: str, first_page: int, page_count: int) -> None:
        """Count pages as written at the next sync: native code of the VMM placed them. Writes and discards
        through `vmm.ram` are marked by themselves. Any thread.
        """

    def stop(self) -> None:
        """Watch no more: others can register the ranges once it returns. A second call does nothing."""


def open_dirty_log(ram: GuestRam, cpu_log: CpuLog | None, rung: Rung = "auto") -> DirtyLog:
    """The log of the best rung that works here, or of the one asked for. Nothing is armed before `start`.

    Raises DirtyLogUnavailable with each rung's reason.
    """
    reasons: dict[str, str] = {}
    for name in RUNGS if rung == "auto" else (rung,):
        why = _why_not(name, ram, cpu_log)
        if why is None:
            return _open(name, ram, cpu_log, reasons)
        logger.warning("The dirty log cannot use the rung '%s': %s", name, why)
        reasons[name] = why
    raise DirtyLogUnavailable(reasons)


def _why_not(rung: Rung, ram: GuestRam, cpu_log: CpuLog | None) -> str | None:
    if rung == "async":
        return AsyncDirtyLog.why_not(ram)
    if rung == "sync":
        return SyncDirtyLog.why_not(ram)
    if rung == "engine":
        return None if cpu_log is not None else "This CPU engine keeps no log of stores; use another rung"
    return f"There is no such rung; use one of auto, {', '.join(RUNGS)}"


def _open(rung: Rung, ram: GuestRam, cpu_log: CpuLog | None, passed_over: dict[str, str]) -> DirtyLog:
    if rung == "async":
        return AsyncDirtyLog(ram, passed_over)
    if rung == "sync":
        return SyncDirtyLog(ram, passed_over)
    assert cpu_log is not None  # _why_not has seen to it
    return EngineDirtyLog(ram, passed_over, cpu_log)
