"""`ProtectLog`: which pages were written, learned from write-protect faults that a native loop answers.

The loop runs without the GIL in one blocking call, on a thread of its own: a writer waits for it, and the
writer may be a Python thread. Its rules are in protect_log.c.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from uffd._native import checked, ffi, lib
from uffd.errors import UffdError, refused
from uffd.userfaultfd import Userfaultfd

__all__ = ["ProtectLog"]


class ProtectLog:
    """Ranges that are registered for WP with `userfaultfd`, and the thread that answers for them.

    Life: `add` each range, `start`, protect the ranges, `collect` any number of times from one thread,
    unregister them, `stop`. The userfaultfd stays the caller's, who closes it after `stop`.
    """

    def __init__(self, userfaultfd: Userfaultfd, range_count: int) -> None:
        """Raises OutOfMemory."""
        self._cancel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Owned by this object from here to stop(), which waits for the thread that uses it.
        self._log: Any = lib.protect_log_new(userfaultfd.fd, self._cancel, range_count)
        if self._log == ffi.NULL:
            os.close(self._cancel)
            raise refused("calloc", 12)
        self._thread: threading.Thread | None = None
        self._error: UffdError | None = None

    def add(self, address: int, page_count: int) -> int:
        """Log a range; the number that `collect` knows it by. Only before `start`. Raises OutOfMemory."""
        return checked(lib.protect_log_add(self._log, address, page_count), "calloc", address, page_count)

    def start(self, thread_name: str) -> None:
        """Answer faults from now on."""
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)
        self._thread.start()

    def collect(self, number: int, bitmap: int) -> int:
        """OR the pages written since the last time into the bitmap at that address and protect them again;
        how many bits are new.

        Raises UffdError if the loop has ended with an error: its writers wait, nothing is logged any more.
        """
        if self._error is not None:
            raise UffdError("The loop that answers write-protect faults has ended") from self._error
        return checked(lib.protect_log_collect(self._log, number, bitmap), "UFFDIO_WRITEPROTECT")

    @property
    def fault_count(self) -> int:
        """How many faults were answered."""
        return int(lib.protect_log_faults(self._log))

    def stop(self) -> None:
        """End the loop and free the log, after the ranges were unregistered. Raises what ended the loop."""
        if self._thread is not None:
            os.eventfd_write(self._cancel, 1)
            self._thread.join()
            self._thread = None
        if self._log != ffi.NULL:
            lib.protect_log_free(self._log)
            self._log = ffi.NULL
            os.close(self._cancel)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            checked(lib.protect_log_run(self._log), "The loop for write-protect faults")
        except UffdError as error:
            self._error = error
