"""The fixed hardware of ACPI that the machine has: the power button and the way to power off.

    port + 0   PM1 status   bit 8: the power button was pressed; written 1 clears it
    port + 2   PM1 enable   always: power button and global lock; bit 10, the clock's alarm, can be written
    port + 4   PM1 control  bit 0: ACPI mode, always; sleep type (10..12) 5 with sleep enable (13): power off

So only a button that was pressed and not yet seen is state: a guest that moves to a machine without these
ports (stock's has none) loses nothing else. The alarm's bit is there because Linux looks whether its store
has worked; the clock has an interrupt of its own and never wakes the machine.

Source: ACPI 6.4, 4.8.3 "Fixed Hardware Registers".
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmm.devices.bus import PortBus
from vmm.vmstate import Description, Field, Values

__all__ = ["PM_IRQ", "PM_PORT", "AcpiPm"]

PM_PORT, PM_PORTS = 0x600, 6
PM_IRQ = 14
POWER_BUTTON = 1 << 8
ENABLED = POWER_BUTTON | 1 << 5
ACPI_MODE = 1
CLOCK_ALARM = 1 << 10
SLEEP_ENABLE = 1 << 13
S5_TYPE = 5


class AcpiPm:
    """`set_irq` gets the level of PM_IRQ; `on_power_off` is called on the vCPU's thread, inside the run."""

    idstr = "pageferry-acpi-pm"
    instance_id = 0
    description = Description(idstr, 1, 1, (Field("status", "uint16"),))

    def __init__(
        self, bus: PortBus, set_irq: Callable[[bool], None], on_power_off: Callable[[], None]
    ) -> None:
        """Raises DeviceError if a port is taken."""
        self._set_irq = set_irq
        self._on_power_off = on_power_off
        self._lock = threading.Lock()  # protects the status
        self._status = 0
        self._alarm = 0
        bus.add("acpi-pm", PM_PORT, PM_PORTS, self._read, self._write, wide=True)

    def press_power_button(self) -> None:
        """Tell the guest. Any thread."""
        with self._lock:
            self._status |= POWER_BUTTON
            self._set_irq(True)

    def reset(self) -> None:
        """As after power-on."""
        with self._lock:
            self._status = self._alarm = 0
            self._set_irq(False)

    def _read(self, offset: int) -> int:
        registers = self._status | (ENABLED | self._alarm) << 16 | ACPI_MODE << 32
        return registers >> 8 * offset & 0xFF

    def _write(self, offset: int, size: int, value: int) -> None:
        value <<= 8 * offset
        if offset < 2:
            with self._lock:
                self._status &= ~value
                self._set_irq(bool(self._status))
        elif offset < 4:
            if offset + size > 3:
                self._alarm = value >> 16 & CLOCK_ALARM
        else:
            control = value >> 32
            if control & SLEEP_ENABLE and control >> 10 & 7 == S5_TYPE:
                self._on_power_off()

    def save(self) -> Values:
        return {"status": self._status}

    def load(self, values: Values, version: int) -> None:
        with self._lock:
            self._status = values["status"] & POWER_BUTTON
            self._set_irq(bool(self._status))
