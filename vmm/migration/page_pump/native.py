"""The one file that imports the C page pump; its callers see Python objects and named errors.

Every call releases the GIL (cffi's API mode does). The structs' memory belongs to the objects here and lives
as long as they do; guest RAM belongs to the RAMBlocks, which outlive every migration.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from vmm.migration.errors import Cancelled
from vmm.migration.page_pump._page_pump import ffi, lib

__all__ = ["check", "ffi", "lib", "wait_fd"]


def check(result: int, what: str) -> int:
    """Return `result`, or raise what a negative one names.

    Raises:
        Cancelled: the cancel eventfd became readable during a wait.
        OSError: everything else, with `what` and the system's text.
    """
    if result == -errno.ECANCELED:
        raise Cancelled()
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return int(result)


def wait_fd(fd: int, cancel_fd: int, timeout_ms: int = -1, *, for_write: bool = False) -> bool:
    """Wait until `fd` is ready; False after `timeout_ms`.

    Raises:
        Cancelled: `cancel_fd` became readable first.
    """
    result: Any = lib.pp_wait(fd, int(for_write), cancel_fd, timeout_ms)
    if result == -errno.ETIMEDOUT:
        return False
    check(result, "Cannot wait")
    return True
