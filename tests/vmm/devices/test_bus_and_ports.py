"""The port bus and the small devices on it."""

from __future__ import annotations

import pytest

from vmm.devices.bus import PortBus
from vmm.devices.catalog import DEVICES
from vmm.devices.control_ports import DebugExit, KeyboardController, Port92, Pvpanic
from vmm.errors import DeviceError


class Calls(list[object]):
    """Remembers what was called."""

    def note(self, what: object) -> None:
        self.append(what)


def test_nobody_reads_all_ones() -> None:
    bus = PortBus()
    assert [bus.read(0x80, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    bus.write(0x80, 4, 0x12345678)


def test_a_wide_access_is_many_narrow_ones() -> None:
    bus, calls = PortBus(), Calls()
    bus.add("toy", 0x10, 2, lambda offset: 0xA0 + offset, lambda *access: calls.note(access))
    assert bus.read(0x10, 4) == 0xFFFFA1A0
    assert bus.read(0xFFFF, 2) == 0xFFFF
    bus.write(0x10, 4, 0x44332211)
    assert calls == [(0, 1, 0x11), (1, 1, 0x22)]


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0xFFFF, 2), (0x12, 1)])
def test_ports_that_cannot_be_had(first: int, count: int) -> None:
    bus = PortBus()
    bus.add("taken", 0x12, 1, lambda offset: 0, lambda *access: None)
    with pytest.raises(DeviceError):
        bus.add("toy", first, count, lambda offset: 0, lambda *access: None)


def test_port_92_resets_on_the_edge_and_travels() -> None:
    bus, calls = PortBus(), Calls()
    port = Port92(bus, lambda: calls.note("reset"))
    assert bus.read(0x92, 1) == 2
    bus.write(0x92, 1, 0)
    bus.write(0x92, 1, 1)
    bus.write(0x92, 1, 1)
    assert calls == ["reset"]
    assert port.save() == {"outport": 1}
    port.reset()
    assert port.save() == {"outport": 2}
    port.load({"outport": 0}, 1)
    assert bus.read(0x92, 1) == 0


def test_keyboard_controller_resets() -> None:
    bus, calls = PortBus(), Calls()
    KeyboardController(bus, lambda: calls.note("reset"))
    assert bus.read(0x64, 1) == 0
    bus.write(0x64, 1, 0xD1)
    assert calls == []
    bus.write(0x64, 1, 0xFE)
    assert calls == ["reset"]


@pytest.mark.parametrize(
    ("size", "value", "status"), [(1, 0, 1), (1, 0x10, 0x21), (4, 0x10, 0x21), (2, 0x80, 1)]
)
def test_debug_exit(size: int, value: int, status: int) -> None:
    bus, calls = PortBus(), Calls()
    DebugExit(bus, 0xF4, 4, calls.note)
    assert bus.read(0xF4, 1) == 0
    bus.write(0xF4, size, value)
    assert calls == [status]


@pytest.mark.parametrize(("value", "what"), [(1, ["panicked"]), (2, ["loaded"]), (3, ["panicked"]), (4, [])])
def test_pvpanic(value: int, what: list[object]) -> None:
    bus, calls = PortBus(), Calls()
    Pvpanic(bus, 0x505, 3, lambda: calls.note("panicked"), lambda: calls.note("loaded"))
    assert bus.read(0x505, 1) == 3
    bus.write(0x505, 1, value)
    assert calls == what


def test_the_catalog_has_defaults_of_its_own_keys() -> None:
    for device in DEVICES.values():
        assert set(device.defaults) <= set(device.keys)


def test_a_port_that_no_device_has_is_told_of_when_it_is_used() -> None:
    told: list[int] = []
    bus = PortBus(told.append)
    bus.add("device", 0x10, 1, lambda offset: 1, lambda offset, size, value: None)
    assert bus.read(0x10, 2) == 0xFF01
    bus.write(0x12, 1, 0)
    assert told == [0x11, 0x12]
