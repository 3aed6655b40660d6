"""What can go wrong in `uffd`, and whose fault it is.

    UffdError
    ├── UffdUnavailable      this system or this user cannot do it; the text says the cure
    └── KernelRefused        one call failed; carries errno, address and length
        ├── AlreadyPresent   EEXIST: a page is already there and was not overwritten
        ├── AlreadyRegistered  EBUSY: another userfaultfd has the range
        ├── NotRegistered    EPERM of a scan, ENOENT of a placement: nobody watches the range
        └── OutOfMemory      ENOMEM: the host, a limit or a full tmpfs

A range outside of a mapping is a mistake of the caller: IndexError.
"""

from __future__ import annotations

import errno
import os

__all__ = [
    "AlreadyPresent",
    "AlreadyRegistered",
    "KernelRefused",
    "NotRegistered",
    "OutOfMemory",
    "UffdError",
    "UffdUnavailable",
    "refused",
]


class UffdError(Exception):
    """The root of this package's errors."""


class UffdUnavailable(UffdError):
    """The kernel feature is missing or not permitted. The text names the cure."""


class KernelRefused(UffdError):
    """One call to the kernel failed.

    `operation` is its name in the kernel's words, `errno` the positive number, `address` and `length`
    the range in bytes.
    """

    def __init__(self, operation: str, number: int, address: int, length: int) -> None:
        self.operation = operation
        self.errno = number
        self.address = address
        self.length = length
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{operation} of {length} bytes at {address:#x}: {name}, {os.strerror(number)}")


class AlreadyPresent(KernelRefused):
    """A page to be placed was already there. It was left as it is."""


class AlreadyRegistered(KernelRefused):
    """The range is registered with another userfaultfd. Unregister it there first."""


class NotRegistered(KernelRefused):
    """The range is not registered, or not all of it."""


class OutOfMemory(KernelRefused):
    """Memory is short: the host's, the limit of a control group, or a full tmpfs."""


_CLASSES: dict[tuple[str, int], type[KernelRefused]] = {
    ("UFFDIO_COPY", errno.EEXIST): AlreadyPresent,
    ("UFFDIO_ZEROPAGE", errno.EEXIST): AlreadyPresent,
    ("UFFDIO_REGISTER", errno.EBUSY): AlreadyRegistered,
    ("UFFDIO_COPY", errno.ENOENT): NotRegistered,
    ("UFFDIO_ZEROPAGE", errno.ENOENT): NotRegistered,
    ("UFFDIO_WRITEPROTECT", errno.ENOENT): NotRegistered,
    ("PAGEMAP_SCAN", errno.EPERM): NotRegistered,
}


def refused(operation: str, number: int | None, address: int = 0, length: int = 0) -> KernelRefused:
    """The error for a failed call; the one place where an errno gets its class."""
    number = number or errno.EIO  # an OSError of Python's own may carry none
    kind = OutOfMemory if number == errno.ENOMEM else _CLASSES.get((operation, number), KernelRefused)
    return kind(operation, number, address, length)
