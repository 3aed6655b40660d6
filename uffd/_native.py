"""The only file that imports the C module `uffd._uffd`: its calls, and errors in place of -errno."""

from __future__ import annotations

from uffd._uffd import ffi, lib
from uffd.errors import refused

__all__ = ["PAGE_SIZE_BYTES", "checked", "ffi", "lib"]


PAGE_SIZE_BYTES = 4096
"""The page of x86-64, and of QEMU's migration stream for it."""


def checked(result: int, operation: str, address: int = 0, length: int = 0) -> int:
    """`result` if it is a count; raise KernelRefused or a child of it if it is -errno."""
    if result < 0:
        raise refused(operation, -result, address, length)
    return result
