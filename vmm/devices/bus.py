"""The port I/O bus: which device answers at which port. An access that nobody answers reads all ones.

Devices are eight bits wide unless they say otherwise: a wider access is that many accesses to
consecutive ports, lowest first, as on the ISA bus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from vmm.errors import DeviceError

__all__ = ["PortBus"]

log = logging.getLogger(__name__)

PORTS = 0x10000

PortRead = Callable[[int], int]
"""Called with the offset within the range; gives a byte."""
PortWrite = Callable[[int, int, int], None]
"""Called with the offset, the size in bytes and the value."""


@dataclass(frozen=True)
class _Range:
    name: str
    first: int
    read: PortRead
    write: PortWrite
    wide: bool


class PortBus:
    """Filled before the guest runs; then `read` and `write` are called on the vCPU's thread."""

    def __init__(self, on_nobody: Callable[[int], None] = lambda port: None) -> None:
        """`on_nobody` hears of a port that the guest used and that no device has: none ever will."""
        self._on_nobody = on_nobody
        self._ports: dict[int, _Range] = {}
        self._noted: set[int] = set()

    def add(
        self, name: str, first: int, count: int, read: PortRead, write: PortWrite, *, wide: bool = False
    ) -> None:
        """Give ports to a device; a `wide` one takes writes of 2 and 4 bytes whole.

        Raises DeviceError if the ports do not exist or one is taken; then nothing was given.
        """
        if first < 0 or count < 1 or first + count > PORTS:
            raise DeviceError(f"{name} cannot have {count} ports from {first:#x}: there are {PORTS:#x}")
        for port in range(first, first + count):
            if port in self._ports:
                raise DeviceError(f"{name} cannot have port {port:#x}: {self._ports[port].name} has it")
        entry = _Range(name, first, read, write, wide)
        self._ports.update(dict.fromkeys(range(first, first + count), entry))

    def read(self, port: int, size: int) -> int:
        """IN: little-endian, all ones where nobody answers."""
        value = 0
        for index in range(size):
            entry = self._ports.get(port + index & 0xFFFF)
            if entry is None:
                byte = 0xFF
                self._note(port + index & 0xFFFF, "read")
            else:
                byte = entry.read(port + index - entry.first) & 0xFF
            value |= byte << 8 * index
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        entry = self._ports.get(port)
        if entry is not None and (size == 1 or entry.wide):
            entry.write(port - entry.first, size, value)
            return
        for index in range(size):
            entry = self._ports.get(port + index & 0xFFFF)
            if entry is None:
                self._note(port + index & 0xFFFF, "written")
            else:
                entry.write(port + index - entry.first, 1, value >> 8 * index & 0xFF)

    def _note(self, port: int, what: str) -> None:
        self._on_nobody(port)
        if port not in self._noted and len(self._noted) < 64:  # arbitrary: a log, not a flood
            self._noted.add(port)
            log.info("port %#x %s, no device has it", port, what)
