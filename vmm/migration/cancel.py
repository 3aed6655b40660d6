"""Eventfds that end native waits: `CancelEvent` at once and for good, `KickEvent` once each time."""

from __future__ import annotations

import contextlib
import os

__all__ = ["CancelEvent", "KickEvent"]


class CancelEvent:
    """Set once; `fd` is readable from then on. Any thread may set it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False

    def set(self) -> None:
        """Make every wait with `fd` end now."""
        self.is_set = True
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the descriptor. Nobody may wait on it any more."""
        os.close(self.fd)


class KickEvent:
    """Wakes one waiting thread, again and again: `kick` from any thread, `take` by the one that waited."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def kick(self) -> None:
        """Make `fd` readable."""
        os.eventfd_write(self.fd, 1)

    def take(self) -> None:
        """Make `fd` unreadable again, whether or not it was kicked."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Close the descriptor. Nobody may wait on it any more."""
        os.close(self.fd)
