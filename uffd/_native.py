"""The only file that imports the C module `uffd._uffd`: its calls, and errors in place of -errno."""

from __future__ import annotations

from typing import Any

from uffd.errors import refused

__all__ = ["PAGE_SIZE_BYTES", "checked", "ffi", "lib"]


class _NotBuilt:
    """Stands for the C module in a tree where it was not built: its builder lies in this package too, which
    therefore must be importable without it."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError("The C module uffd._uffd is not built; run `make build`")


ffi: Any
lib: Any
try:
    from uffd import _uffd
except ImportError:
    ffi = lib = _NotBuilt()
else:
    ffi, lib = _uffd.ffi, _uffd.lib

PAGE_SIZE_BYTES = 4096
"""The page of x86-64, and of QEMU's migration stream for it."""


def checked(result: int, operation: str, address: int = 0, length: int = 0) -> int:
    """`result` if it is a count; raise KernelRefused or a child of it if it is -errno."""
    if result < 0:
        raise refused(operation, -result, address, length)
    return result
