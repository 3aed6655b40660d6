"""File descriptors that a client passed with SCM_RIGHTS, and the names it gave them with `getfd`.

A descriptor comes with any byte of the stream and waits until a command takes it; a later one replaces it,
as in QEMU. The store owns every descriptor in it, their number is bounded, and closing it closes them all.
"""

from __future__ import annotations

import os
from typing import Final

from qmp.errors import GenericError
from qmp.fdsets import FdSets

__all__ = ["MAX_NAMED_FDS", "FdStore"]

MAX_NAMED_FDS: Final = 64
"""Arbitrary: a migration needs one. QEMU has no bound."""


class FdStore:
    """The descriptors of one client; `sets` are those that it shares with the others."""

    def __init__(self, sets: FdSets | None = None) -> None:
        self.sets = FdSets() if sets is None else sets
        self.sets.client_came()
        self._closed = False
        self._received: list[int] = []
        self._named: dict[str, int] = {}

    def receive(self, fds: list[int]) -> None:
        """Own descriptors that just arrived; those not taken yet are closed."""
        if fds:
            self._close_all(self._received)
            self._received = fds

    def take_received(self) -> int:
        """The first descriptor of the last message; the caller owns it.

        Raises:
            GenericError: none was passed.
        """
        if not self._received:
            raise GenericError("No file descriptor supplied via SCM_RIGHTS")
        return self._received.pop(0)

    def name_received(self, name: str) -> None:
        """`getfd`: give the received descriptor a name; one that had the name is closed.

        Raises:
            GenericError: none was passed, the name starts with a digit, or there are too many.
        """
        fd = self.take_received()
        if name[:1].isdigit():
            os.close(fd)
            raise GenericError("Parameter 'fdname' expects a name not starting with a digit")
        old = self._named.get(name)
        if old is None and len(self._named) >= MAX_NAMED_FDS:
            os.close(fd)
            raise GenericError(f"Too many file descriptors, {MAX_NAMED_FDS} are allowed")
        self._named[name] = fd
        if old is not None:
            os.close(old)

    def close_named(self, name: str) -> None:
        """`closefd`.

        Raises:
            GenericError: there is none of that name.
        """
        if name not in self._named:
            raise GenericError(f"File descriptor named '{name}' not found")
        os.close(self._named.pop(name))

    def take(self, name: str) -> int:
        """The named descriptor, which leaves the store: the caller owns it (`fd:NAME` of a migration).

        Raises:
            GenericError: there is none of that name.
        """
        if name not in self._named:
            raise GenericError(f"File descriptor named '{name}' has not been found")
        return self._named.pop(name)

    def close(self) -> None:
        """Close every descriptor still owned; once is enough."""
        if self._closed:
            return
        self._closed = True
        self._close_all(self._received)
        self._close_all(list(self._named.values()))
        self._received = []
        self._named = {}
        self.sets.client_left()

    @staticmethod
    def _close_all(fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
