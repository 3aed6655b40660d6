"""Sets of file descriptors, passed with `add-fd` and used by path: `/dev/fdset/N` is the set numbered N.

The sets belong to all clients of a process together, as in QEMU: one client may add a descriptor and another
name it. They live as long as any client is connected; when the last one has left everything is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from dataclasses import dataclass
from typing import Any, Final

from qmp.errors import GenericError

__all__ = ["MAX_SET_FDS", "FdSets"]

MAX_SET_FDS: Final = 256
"""Descriptors in all sets. Arbitrary: a quarter of the usual limit of open files. QEMU has no bound."""

_PATH = re.compile(r"/dev/fdset/([0-9]{1,18})")


@dataclass(frozen=True)
class _Member:
    fd: int
    opaque: str | None

    def describe(self) -> dict[str, Any]:
        return {"fd": self.fd} | ({} if self.opaque is None else {"opaque": self.opaque})


class FdSets:
    """The sets, and how many clients there are. Owns every descriptor in it."""

    def __init__(self) -> None:
        self._sets: dict[int, list[_Member]] = {}
        self._clients = 0

    def client_came(self) -> None:
        """One more client is connected."""
        self._clients += 1

    def client_left(self) -> None:
        """One less; after the last the sets are emptied."""
        self._clients -= 1
        if self._clients == 0:
            self.clear()

    def clear(self) -> None:
        """Close everything."""
        for members in self._sets.values():
            _close(members)
        self._sets.clear()

    def add(self, fd: int, set_id: int | None = None, opaque: str | None = None) -> dict[str, int]:
        """Own `fd`, in the set of that number or in a new one with the lowest free number: AddfdInfo.

        Raises:
            GenericError: the number is negative, or there are too many descriptors; `fd` is closed.
        """
        try:
            if set_id is not None and set_id < 0:
                raise GenericError("Parameter 'fdset-id' expects a non-negative value")
            if sum(map(len, self._sets.values())) >= MAX_SET_FDS:
                raise GenericError(f"Too many file descriptors, {MAX_SET_FDS} are allowed")
        except GenericError:
            os.close(fd)
            raise
        if set_id is None:
            set_id = next(number for number in range(len(self._sets) + 1) if number not in self._sets)
        self._sets.setdefault(set_id, []).append(_Member(fd, opaque))
        return {"fd": fd, "fdset-id": set_id}

    def remove(self, set_id: int, fd: int | None = None) -> None:
        """Close one descriptor of a set, or all of them.

        Raises:
            GenericError: there is no such set, or the descriptor is not in it.
        """
        members = self._sets.get(set_id, [])
        leaving = members if fd is None else [member for member in members if member.fd == fd]
        if not leaving:
            what = f"fdset-id:{set_id}" + ("" if fd is None else f", fd:{fd}")
            raise GenericError(f"File descriptor named '{what}' not found")
        staying = [member for member in members if member not in leaving]
        _close(leaving)
        if staying:
            self._sets[set_id] = staying
        else:
            del self._sets[set_id]

    def describe(self) -> list[dict[str, Any]]:
        """FdsetInfo of each set, the highest number first, as QEMU lists them."""
        return [
            {"fdset-id": set_id, "fds": [member.describe() for member in self._sets[set_id]]}
            for set_id in sorted(self._sets, reverse=True)
        ]

    def resolve(self, path: str, flags: int) -> str:
        """For `/dev/fdset/N` a path that opens what the set holds; any other path as it is.

        `flags` are those of open(2): the descriptor must have been opened for as much.

        Raises:
            OSError: there is no such set, or nothing in it can be read or written as asked.
        """
        match = _PATH.fullmatch(path)
        if match is None:
            return path
        wanted = flags & os.O_ACCMODE
        members = self._sets.get(int(match[1]))
        if members is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        for member in members:
            if fcntl.fcntl(member.fd, fcntl.F_GETFL) & os.O_ACCMODE in (wanted, os.O_RDWR):
                return f"/proc/self/fd/{member.fd}"
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)


def _close(members: list[_Member]) -> None:
    for member in members:
        os.close(member.fd)
