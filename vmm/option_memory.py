"""-m, -object and -numa: which RAMBlocks the guest's memory is made of.

-m SIZE                                         one block with the machine's own name
-object memory-backend-...,id=A  -machine memory-backend=A      one block called A
-object ...,id=A -object ...,id=B -numa node,memdev=A -numa node,memdev=B     two, one after the other
"""

from __future__ import annotations

from typing import Any

from vmm.config import BackendConfig
from vmm.errors import OptionError
from vmm.option_syntax import accepted, parse_keys, parse_size
from vmm.option_table import OBJECTS, OPTIONS

__all__ = ["Memory"]

MIB = 1 << 20
GIB = 1 << 30
ALIGNMENT_BYTES = 8192
"""QEMU's machine_parse_memory rounds -m up to it."""
DEFAULT_BYTES = 128 * MIB
BLOCK_NAMES = {"microvm": "microvm.ram", "none": "ram"}


class Memory:
    """Collects; `finish` checks what belongs together."""

    def __init__(self) -> None:
        self._ram_bytes: int | None = None
        self._objects: dict[str, BackendConfig] = {}
        self._numa: list[str] = []

    def set_size(self, text: str) -> None:
        """-m TEXT."""
        values = parse_keys(text, OPTIONS["m"].implied, OPTIONS["m"].keys)
        if "size" in values:
            size = parse_size("size", str(values["size"]), default_suffix="M")
            self._ram_bytes = -(-_check_size(size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if values.get("slots"):
            raise OptionError("Parameter 'slots' must be 0: RAM cannot be plugged in")

    def add_object(self, text: str) -> None:
        """-object TEXT."""
        values = parse_keys(text, OPTIONS["object"].implied, OPTIONS["object"].keys)
        kind = str(values.get("qom-type", ""))
        if kind not in OBJECTS:
            raise OptionError(
                f"Parameter 'qom-type' does not accept value '{kind}'; {accepted(OBJECTS, kind)}"
            )
        for key in ("id", "size"):
            if key not in values:
                raise OptionError(f"Parameter '{key}' is missing")
        for key in ("prealloc", "hugetlb"):
            if values.get(key):
                raise OptionError(f"Parameter '{key}' must be off: not supported")
        name, size = _check_id(str(values["id"])), _check_size(int(values["size"]))
        if size % 4096:
            raise OptionError(f"Parameter 'size' expects a multiple of 4096 bytes, got {size}")
        if name in self._objects:
            raise OptionError(f"Object '{name}' already exists")
        share = bool(values.get("share", kind == "memory-backend-memfd"))
        self._objects[name] = BackendConfig(name, size, kind == "memory-backend-memfd" or share, share)

    def add_numa_node(self, text: str) -> None:
        """-numa TEXT."""
        values = parse_keys(text, OPTIONS["numa"].implied, OPTIONS["numa"].keys)
        if "memdev" not in values:
            raise OptionError("Parameter 'memdev' is missing")
        self._numa.append(str(values["memdev"]))

    def finish(self, machine_type: str, backend: Any) -> tuple[BackendConfig, ...]:
        """The blocks of guest RAM, `backend` being -machine memory-backend= or None."""
        if self._numa and backend is not None:
            raise OptionError("Cannot be combined with -numa node,memdev=", "-machine memory-backend")
        if not self._numa and backend is None:
            return (BackendConfig(BLOCK_NAMES[machine_type], self._ram_bytes or DEFAULT_BYTES),)
        names = self._numa or [str(backend)]
        for name in names:
            if name not in self._objects:
                known = accepted(self._objects, name)
                raise OptionError(f"Memory backend '{name}' not found; {known}", "-machine memory-backend")
            if names.count(name) > 1:
                raise OptionError(f"Memory backend '{name}' is used twice", "-numa")
        blocks = tuple(self._objects[name] for name in names)
        total = _check_size(sum(block.length_bytes for block in blocks))
        if self._ram_bytes not in (None, total):
            raise OptionError(
                f"Expected {total} bytes, as the memory backend has, got {self._ram_bytes}", "-m"
            )
        return blocks


def _check_size(size: int) -> int:
    if not MIB <= size <= 64 * GIB:
        raise OptionError(f"Parameter 'size' expects 1M to 64G of RAM, got {size} bytes")
    return size


def _check_id(name: str) -> str:
    if name.isascii() and name[:1].isalpha() and all(c.isalnum() or c in "-._" for c in name):
        return name
    expected = "a letter, then letters, digits, '-', '.', '_'"
    raise OptionError(f"Parameter 'id' expects {expected}; got '{name}'")
