"""`Userfaultfd`: decides what happens when a page that is missing or protected is touched.

The kernel's page: Documentation/admin-guide/mm/userfaultfd.rst. Rules of this file:

1. A userfaultfd that goes away while a page is missing turns it into a page of zeroes, without a
   word. So there is no `__del__`, `close` refuses while a MISSING range is registered, and a second
   descriptor that nobody else knows keeps the object alive through a stray close() of the first.
2. MISSING and write-protection are never armed on one range at once.
3. No range is registered with event features: with them every placement fails until an event is read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from uffd._native import checked, ffi, lib
from uffd.errors import UffdError, UffdUnavailable, refused

__all__ = ["Fault", "Features", "Mode", "Placed", "Userfaultfd", "open_raw"]


class Features(enum.IntFlag):
    """What a kernel's userfaultfd can do (the names without UFFD_FEATURE_, and the first Linux)."""

    PAGEFAULT_FLAG_WP = 1 << 0  # 5.7
    MISSING_SHMEM = 1 << 5  # 4.11
    SIGBUS = 1 << 7  # 4.14
    THREAD_ID = 1 << 8  # 4.14
    EXACT_ADDRESS = 1 << 11  # 5.18
    WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7


NO_FEATURES = Features(0)
"""What MISSING on anonymous memory needs."""


class Mode(enum.Enum):
    """What a range is registered for."""

    MISSING = 1 << 0
    WP = 1 << 1


class Placed(NamedTuple):
    """How far a placement came, and what stopped it: two facts that the kernel folds into one number.

    `errno` 0: all of it. EAGAIN after some bytes: ask again for the rest. EEXIST: the next page is
    present and was not overwritten; whoever waits for it may still be owed a `wake`.
    """

    bytes_done: int
    errno: int


class Fault(NamedTuple):
    """A thread waits at `address`."""

    address: int
    is_write: bool
    is_protected: bool
    thread_id: int


RUNGS: tuple[tuple[str, Callable[[], int], bool], ...] = (
    ("/dev/userfaultfd", lambda: lib.uffd_open_device(0), False),
    ("userfaultfd(2)", lambda: lib.uffd_open_syscall(0), False),
    (
        "userfaultfd(2) with UFFD_USER_MODE_ONLY",
        lambda: lib.uffd_open_syscall(lib.UFFD_USER_MODE_ONLY),
        True,
    ),
)
"""The ladder of ways to get one: name, call, whether faults inside system calls are left out (EFAULT)."""


class Opened(NamedTuple):
    """A descriptor that has not shaken hands yet."""

    fd: int
    rung: str
    user_mode_only: bool


def open_raw() -> Opened:
    """Climb down the ladder to the first way that works.

    Raises UffdUnavailable with the errno name of every rung.
    """
    failures = []
    for name, call, user_mode_only in RUNGS:
        fd = call()
        if fd >= 0:
            return Opened(fd, name, user_mode_only)
        failures.append(str(refused(name, -fd)).replace(" of 0 bytes at 0x0", ""))
    raise UffdUnavailable("; ".join(failures))


class Userfaultfd:
    """One userfaultfd with its features, and the ranges that are registered with it.

    Not locked: `register` and `unregister` belong to one thread; placing, waking and reading faults may
    happen in any. Addresses and lengths are in bytes and multiples of the page size.
    """

    def __init__(self, features: Features = NO_FEATURES) -> None:
        """Open one and ask for `features`.

        Raises UffdUnavailable if there is no way to open one, KernelRefused (EINVAL) if the kernel lacks a
        feature.
        """
        opened = open_raw()
        self.fd = opened.fd
        self.rung = opened.rung
        self.user_mode_only = opened.user_mode_only
        self.features = features
        self.registered: dict[tuple[int, int], Mode] = {}
        self._keeper = -1
        result = lib.uffd_handshake(self.fd, int(features), ffi.new("uint64_t *"))
        if result < 0:
            lib.uffd_close(self.fd)
            self.fd = -1
        checked(result, "UFFDIO_API")

    def register(self, address: int, length: int, mode: Mode) -> None:
        """Watch a range.

        Raises AlreadyRegistered if another userfaultfd has some of it, UffdError if this one has it in
        the other mode (rule 2).
        """
        for (start, size), other in self.registered.items():
            if start < address + length and address < start + size and other is not mode:
                raise UffdError(
                    f"{start:#x} is registered for {other.name}, it cannot be for {mode.name} too"
                )
        if mode is Mode.MISSING and self._keeper < 0:
            self._keeper = checked(lib.uffd_duplicate(self.fd), "F_DUPFD_CLOEXEC")
        checked(lib.uffd_register(self.fd, address, length, mode.value), "UFFDIO_REGISTER", address, length)
        self.registered[address, length] = mode

    def unregister(self, address: int, length: int) -> None:
        """Stop watching a range that was registered as such, and wake all who wait in it.

        A page of it that is missing reads as zeroes from now on: the caller has checked that none is.
        """
        if (address, length) not in self.registered:
            raise UffdError(f"{length} bytes at {address:#x} were not registered here")
        checked(lib.uffd_unregister(self.fd, address, length), "UFFDIO_UNREGISTER", address, length)
        del self.registered[address, length]
        self.wake(address, length)  # the kernel wakes those who wait for a missing page, but no writers

    def copy(self, address: int, source: int, length: int, *, wake: bool = True) -> Placed:
        """Place `length` bytes from `source` into missing pages, each at once and whole."""
        mode = 0 if wake else lib.UFFDIO_COPY_MODE_DONTWAKE
        done = ffi.new("uint64_t *")
        error = -lib.uffd_copy(self.fd, address, source, length, mode, done)
        return Placed(done[0], error)

    def zeropage(self, address: int, length: int, *, wake: bool = True) -> Placed:
        """Place pages of zeroes."""
        mode = 0 if wake else lib.UFFDIO_ZEROPAGE_MODE_DONTWAKE
        done = ffi.new("uint64_t *")
        error = -lib.uffd_zeropage(self.fd, address, length, mode, done)
        return Placed(done[0], error)

    def poison(self, address: int, length: int) -> Placed:
        """Make a touch of these missing pages a SIGBUS, until a `copy` heals them (feature POISON)."""
        done = ffi.new("uint64_t *")
        error = -lib.uffd_poison(self.fd, address, length, done)
        return Placed(done[0], error)

    def wake(self, address: int, length: int) -> None:
        """Let those who wait in a range try again. Alone it helps only where the page is present."""
        checked(lib.uffd_wake(self.fd, address, length), "UFFDIO_WAKE", address, length)

    def protect(self, address: int, length: int) -> None:
        """Make the next write to each page of a range a fault.

        Raises NotRegistered if some of it is not registered for WP.
        """
        mode = lib.UFFDIO_WRITEPROTECT_MODE_WP
        result = lib.uffd_writeprotect(self.fd, address, length, mode)
        checked(result, "UFFDIO_WRITEPROTECT", address, length)

    def unprotect(self, address: int, length: int) -> None:
        """Let a range be written, and wake the writers."""
        result = lib.uffd_writeprotect(self.fd, address, length, 0)
        checked(result, "UFFDIO_WRITEPROTECT", address, length)

    def read_faults_nowait(self) -> list[Fault]:
        """The faults that are waiting for an answer, up to 64; none is reported twice."""
        faults = ffi.new("struct uffd_fault[64]")
        count = checked(lib.uffd_read_faults(self.fd, faults, 64), "read of a userfaultfd")
        return [
            Fault(
                f.address,
                bool(f.flags & lib.UFFD_PAGEFAULT_FLAG_WRITE),
                bool(f.flags & lib.UFFD_PAGEFAULT_FLAG_WP),
                f.thread_id,
            )
            for f in faults[0:count]
        ]

    def close(self) -> None:
        """Give up the descriptor; a second call does nothing.

        Raises UffdError while a range is registered for MISSING (rule 1); nothing is closed then.
        """
        if Mode.MISSING in self.registered.values():
            raise UffdError("A userfaultfd with a MISSING range was to be closed; unregister the range first")
        for fd in (self.fd, self._keeper):
            if fd >= 0:
                lib.uffd_close(fd)
        self.fd = self._keeper = -1
        self.registered.clear()
