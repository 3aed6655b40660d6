"""postcopy-preempt at the source: when the second channel is used, and what it has carried.

    connect main, connect second | precopy over main | package over main
                                 | requested pages over second, all others over main
                                 | EOS over second, then END over main

As in QEMU 7.2 the second channel has no header: it is the connection made directly after the first, and
carries page records with a CONTINUE state of its own. On recovery both are made anew, in this order.

Source: QEMU 7.2 migration/postcopy-ram.c (postcopy_preempt_*), ram.c (postcopy_preempt_shutdown_file).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.migration.page_pump.preempt import PreemptSender

if TYPE_CHECKING:
    from vmm.migration.channel import Channel
    from vmm.migration.page_pump.sender import PageSender

__all__ = ["PreemptSource"]


class PreemptSource:
    """The second channel of one outgoing migration, if there is one; does nothing without. (mig/source)"""

    def __init__(self, sender: PageSender, cancel_fd: int) -> None:
        self._sender = sender
        self._cancel_fd = cancel_fd
        self._pages: PreemptSender | None = None
        self._bytes_before = 0
        self._normal_before = self._zero_before = 0

    @property
    def total_bytes(self) -> int:
        """Bytes written so far, on all second channels."""
        return self._bytes_before + (self._pages.total_bytes if self._pages else 0)

    @property
    def normal_pages(self) -> int:
        """Pages sent with their content."""
        return self._normal_before + (int(self._pages.struct.normal_pages) if self._pages else 0)

    @property
    def zero_pages(self) -> int:
        """Pages sent as zero."""
        return self._zero_before + (int(self._pages.struct.zero_pages) if self._pages else 0)

    @property
    def pages(self) -> int:
        """All of them were requested."""
        return self.normal_pages + self.zero_pages

    def use(self, channel: Channel | None) -> None:
        """A channel to go on with; `close` was called for that before it."""
        if channel is not None:
            self._pages = PreemptSender(self._sender, channel.write_fd, self._cancel_fd)

    def start(self) -> None:
        """The destination listens: requested pages overtake from now on."""
        if self._pages is not None:
            self._pages.start()

    def end(self) -> None:
        """No page is dirty any more. Raises OSError, Cancelled."""
        if self._pages is not None:
            self._pages.end()

    def close(self) -> None:
        """mig/return has ended."""
        if self._pages is not None:
            self._bytes_before, self._normal_before, self._zero_before = (
                self.total_bytes,
                self.normal_pages,
                self.zero_pages,
            )
            self._pages.stop()
            self._pages = None
