"""The second channel of postcopy-preempt at the source."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from vmm.migration.byte_stream import StreamWriter
from vmm.migration.page_pump.native import check, ffi, lib

if TYPE_CHECKING:
    from vmm.migration.page_pump.sender import PageSender

__all__ = ["PreemptSender"]


class PreemptSender:
    """Sends requested pages of `sender` into `fd`, on the thread that reads the requests (in C)."""

    def __init__(self, sender: PageSender, fd: int, cancel_fd: int) -> None:
        self._sender = sender
        self._writer = StreamWriter(fd, cancel_fd)
        self.struct = ffi.new("struct pp_preempt *")
        check(lib.pp_preempt_init(self.struct, self._writer.struct), "Cannot set up the second channel")
        self.close = weakref.finalize(self, lib.pp_preempt_free, self.struct)
        """Frees the lock, at the latest with the last reference; `stop` was called."""

    @property
    def total_bytes(self) -> int:
        """Bytes written so far."""
        return self._writer.total_bytes

    def start(self) -> None:
        """Requested pages go this way from now on: the destination listens."""
        self.struct.checks = int(self._sender.has_checksums)
        self._sender.struct.preempt = self.struct

    def end(self) -> None:
        """No page goes this way any more; says so to the destination. Raises OSError, Cancelled."""
        check(lib.pp_preempt_end(self.struct), "Unable to write to the second channel")

    def stop(self) -> None:
        """The channel is of no use any more; mig/return, which sends here, has ended."""
        self._sender.struct.preempt = ffi.NULL
