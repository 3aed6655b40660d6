"""What a transport gives: `Channel`, a connected byte stream, and `Incoming`, a place where sources come."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from vmm.migration.errors import Cancelled
from vmm.migration.params import Patience

__all__ = ["Channel", "Incoming", "Patience", "TakeFd", "shown_error"]

TakeFd = Callable[[str], int]
"""Gives the descriptor that a client has passed under a name; raises MigrationError if there is none."""


class Channel:
    """A connected byte stream; `read_fd` and `write_fd` are one descriptor where it is two-way.

    A writer's life is `finish`, `publish`, `close`, or after a failure `abort`, `close`.
    """

    is_withheld = False
    """Can nobody start the guest from what was written before `publish` has succeeded?"""

    def __init__(self, read_fd: int, write_fd: int, two_way: bool, name: str) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.two_way = two_way
        self.name = name
        self.second: Channel | None = None
        """That of postcopy-preempt; it is shut down and closed with this one."""
        self.more: list[Channel] = []
        """Those of multifd; likewise."""
        self._closed = False

    def finish(self, cancel_fd: int = -1) -> None:
        """Everything is written, or read: wait until it is safe at the other end.

        Raises:
            MigrationError, OSError: it is not; says why.
            Cancelled: `cancel_fd` became readable.
        """

    def publish(self) -> None:
        """After `finish`: let others have it. Raises OSError; then nobody has it."""

    def abort(self) -> None:
        """Undo what is half done."""

    def explain(self, error: BaseException, written_bytes: int) -> BaseException:
        """What is to be said about an error that came when so many bytes had been written."""
        del written_bytes
        return error

    def peek(self, count: int) -> bytes:
        """Up to `count` bytes that have come and stay unread; none where that cannot be told."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.read_fd)) as duplicate:
            return duplicate.recv(count, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return b""

    def shutdown(self) -> None:
        """Wake every thread that waits on this channel; it stays open, so that no descriptor is reused."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.write_fd)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
        for other in self._others():
            other.shutdown()

    def close(self) -> None:
        """Close the descriptors; may be called twice. Nobody may be inside a call on them any more."""
        if self._closed:
            return
        self._closed = True
        for fd in {self.read_fd, self.write_fd} - {-1}:
            os.close(fd)
        for other in self._others():
            other.close()

    def _others(self) -> list[Channel]:
        return self.more if self.second is None else [self.second, *self.more]


def shown_error(error: BaseException, what: str, written_bytes: int) -> BaseException:
    """An error of the system with what it happened to, and when; others are as they are."""
    if isinstance(error, Cancelled) or not isinstance(error, OSError) or error.errno is None:
        return error
    text = f"Unable to write to {what} after {written_bytes} bytes: {os.strerror(error.errno)}"
    return OSError(error.errno, text)


@dataclass
class Incoming:
    """The destination's side of a URI, open for a source."""

    name: str
    accept: Callable[[int], Channel]
    """Waits for a source; the argument is the cancel eventfd.

    Raises Cancelled, and OSError when this process has no descriptor or memory left: `accept` may be called
    again after a while."""
    close: Callable[[], None]
    again: bool
    """May `accept` be called again after a failed attempt?"""
    address: dict[str, object] | None = None
    """For query-migrate's `socket-address`."""
    second: Callable[[int, Channel], Channel] | None = None
    """Waits for the connection that a source has made directly after that of the channel.

    Raises Cancelled, OSError as `accept`, and PeerError: it does not come in time."""
