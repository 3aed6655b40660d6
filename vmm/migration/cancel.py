"""Eventfds that end native waits: `CancelEvent` at once and for good, `KickEvent` once each time."""

from __future__ import annotations

import contextlib
import os
import weakref

__all__ = ["CancelEvent", "KickEvent"]


class _Event:
    """An eventfd that is closed with the last reference to its owner: whoever waits on `fd` keeps that."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.close = weakref.finalize(self, os.close, self.fd)


class CancelEvent(_Event):
    """Set once; `fd` is readable from then on. Any thread may set it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_set = False

    def set(self) -> None:
        """Make every wait with `fd` end now."""
        self.is_set = True
        os.eventfd_write(self.fd, 1)


class KickEvent(_Event):
    """Wakes one waiting thread, again and again: `kick` from any thread, `take` by the one that waited."""

    def kick(self) -> None:
        """Make `fd` readable."""
        os.eventfd_write(self.fd, 1)

    def take(self) -> None:
        """Make `fd` unreadable again, whether or not it was kicked."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
