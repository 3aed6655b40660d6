"""The power button and power off, at their ports."""

from __future__ import annotations

import pytest

from vmm.devices.acpi_pm import PM_PORT, AcpiPm
from vmm.devices.bus import PortBus

BUTTON = 1 << 8


class Pm:
    def __init__(self) -> None:
        self.bus = PortBus()
        self.levels: list[bool] = []
        self.offs = 0
        self.device = AcpiPm(self.bus, self.levels.append, self.off)

    def off(self) -> None:
        self.offs += 1


def test_the_button_interrupts_until_it_is_acknowledged() -> None:
    pm = Pm()
    pm.device.press_power_button()
    assert (pm.bus.read(PM_PORT, 2), pm.levels) == (BUTTON, [True])
    pm.bus.write(PM_PORT, 2, 0x20)
    assert pm.levels[-1]
    pm.bus.write(PM_PORT, 2, BUTTON)
    assert (pm.bus.read(PM_PORT, 2), pm.levels[-1]) == (0, False)


def test_what_is_enabled_stays_so() -> None:
    pm = Pm()
    for value in (0, 0xFFFF):
        pm.bus.write(PM_PORT + 2, 2, value)
        assert pm.bus.read(PM_PORT + 2, 2) == 0x120 | value & 0x400


@pytest.mark.parametrize(
    ("control", "off"), [(1 << 13 | 5 << 10, 1), (5 << 10, 0), (1 << 13, 0), (1 << 13 | 3 << 10, 0)]
)
def test_only_sleep_type_5_powers_off(control: int, off: int) -> None:
    pm = Pm()
    pm.bus.write(PM_PORT + 4, 2, control)
    assert (pm.offs, pm.bus.read(PM_PORT + 4, 2)) == (off, 1)


def test_a_button_that_was_not_seen_yet_travels() -> None:
    pm, other = Pm(), Pm()
    pm.device.press_power_button()
    other.device.load(pm.device.save(), 1)
    assert (other.bus.read(PM_PORT, 2), other.levels) == (BUTTON, [True])
    other.device.reset()
    assert (other.bus.read(PM_PORT, 2), other.levels[-1]) == (0, False)
