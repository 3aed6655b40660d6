"""The small devices by which a guest ends, resets or reports itself.

    port 0x92         bit 0: reset when it goes from 0 to 1; bit 1: A20, which is always open here
    ports 0x64        the keyboard controller's command 0xfe: reset
    isa-debug-exit    a write ends the process with status (value << 1) | 1
    pvpanic           a write tells that the guest has panicked (1) or loads its crash kernel (2)

What a write leads to is decided by the callbacks, which run on the vCPU's thread inside of the run.

Sources: QEMU 7.2 hw/isa/port92.c, hw/input/pckbd.c, hw/misc/debugexit.c, docs/specs/pvpanic.txt.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.devices.bus import PortBus
from vmm.vmstate import Description, Field, Values

__all__ = ["DebugExit", "KeyboardController", "Port92", "Pvpanic"]

A20_OPEN = 0x02
FAST_RESET = 0x01
KBD_RESET = 0xFE
PVPANIC_PANICKED = 0x01
PVPANIC_CRASHLOADED = 0x02


class Port92:
    """System control port A."""

    PORT = 0x92
    idstr = "port92"
    instance_id = 0
    description = Description("port92", 1, 1, (Field("outport", "uint8"),))

    def __init__(self, bus: PortBus, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._outport = A20_OPEN
        bus.add("port92", self.PORT, 1, lambda offset: self._outport, self._write)

    def _write(self, offset: int, size: int, value: int) -> None:
        old, self._outport = self._outport, value
        if value & FAST_RESET and not old & FAST_RESET:
            self._on_reset()

    def reset(self) -> None:
        self._outport = A20_OPEN

    def save(self) -> Values:
        return {"outport": self._outport}

    def load(self, values: Values, version: int) -> None:
        self._outport = values["outport"]


class KeyboardController:
    """As much of an i8042 as a reboot needs: its buffers are always empty."""

    PORT = 0x64

    def __init__(self, bus: PortBus, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        bus.add("i8042", self.PORT, 1, lambda offset: 0, self._write)

    def _write(self, offset: int, size: int, value: int) -> None:
        if value == KBD_RESET:
            self._on_reset()


class DebugExit:
    """isa-debug-exit."""

    def __init__(self, bus: PortBus, iobase: int, iosize: int, on_exit: Callable[[int], None]) -> None:
        """`on_exit` gets the exit status. Raises DeviceError."""
        self._on_exit = on_exit
        bus.add("isa-debug-exit", iobase, iosize, lambda offset: 0, self._write, wide=True)

    def _write(self, offset: int, size: int, value: int) -> None:
        self._on_exit((value << 1 | 1) & 0xFF)


class Pvpanic:
    """pvpanic."""

    def __init__(
        self,
        bus: PortBus,
        ioport: int,
        events: int,
        on_panicked: Callable[[], None],
        on_crashloaded: Callable[[], None],
    ) -> None:
        """Raises DeviceError."""
        self._callbacks = ((PVPANIC_PANICKED, on_panicked), (PVPANIC_CRASHLOADED, on_crashloaded))
        bus.add("pvpanic", ioport, 1, lambda offset: events, self._write)

    def _write(self, offset: int, size: int, value: int) -> None:
        for bit, callback in self._callbacks:
            if value & bit:
                callback()
                return
