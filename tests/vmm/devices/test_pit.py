"""The timer counts as an 8254 does, and asks for its interrupt at the right instants."""

from __future__ import annotations

import pytest

from vmm.clock import VirtualClock
from vmm.devices.bus import PortBus
from vmm.devices.pit import PIT_HZ, Pit
from vmm.errors import VMStateError
from vmm.timers import Timers

MS = 1_000_000


class Box:
    """A timer whose clock is turned by hand."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.levels: list[bool] = []
        self.bus = PortBus()
        self.pit = Pit(self.bus, Timers(VirtualClock()), lambda: self.now_ns, self.levels.append)
        self.timer = self.pit._timer

    def program(self, channel: int, mode: int, count: int) -> None:
        self.bus.write(0x43, 1, channel << 6 | 0x30 | mode << 1)
        self.bus.write(0x40 + channel, 1, count & 0xFF)
        self.bus.write(0x40 + channel, 1, count >> 8)

    def counter(self, channel: int) -> int:
        self.bus.write(0x43, 1, channel << 6)
        return self.bus.read(0x40 + channel, 1) | self.bus.read(0x40 + channel, 1) << 8

    def fire(self) -> None:
        """Turn the clock to where the timer is set."""
        assert self.timer.at_ns is not None
        self.now_ns = self.timer.at_ns
        self.timer.callback()


@pytest.mark.parametrize(
    ("mode", "per_interrupt"), [(2, [True, False]), (3, [True])], ids=["rate generator", "square wave"]
)
def test_a_periodic_timer_comes_each_period(mode: int, per_interrupt: list[bool]) -> None:
    box = Box()
    box.program(0, mode, 11932)  # 10 ms
    box.levels.clear()
    at = []
    for _ in range(5):
        box.fire()
        at.append(box.now_ns)
    assert [round(each / MS) for each in at] == [10, 20, 30, 40, 50]
    assert box.levels == per_interrupt * 5


def test_a_late_timer_leaves_out_what_is_over() -> None:
    box = Box()
    box.program(0, 2, 11932)
    assert box.timer.at_ns is not None
    box.now_ns = 95 * MS
    box.timer.callback()
    assert round(box.timer.at_ns / MS) == 100


@pytest.mark.parametrize("mode", [0, 4])
def test_a_one_shot_comes_once(mode: int) -> None:
    box = Box()
    box.program(0, mode, 1193)  # 1 ms
    box.fire()
    assert round(box.now_ns / MS) == 1
    assert box.timer.at_ns is None


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_the_counter_counts_down(mode: int) -> None:
    box = Box()
    box.program(2, mode, 0x8000)
    box.now_ns = 1000 * 1_000_000_000 // PIT_HZ + 1
    assert box.counter(2) == 0x8000 - (2000 if mode == 3 else 1000)


def test_the_output_of_channel_2_is_read_at_port_0x61() -> None:
    box = Box()
    box.bus.write(0x61, 1, 1)
    box.program(2, 0, 1193)
    assert not box.bus.read(0x61, 1) & 0x20
    box.now_ns = 2 * MS
    assert box.bus.read(0x61, 1) & 0x20
    assert box.bus.read(0x61, 1) & 0x01


def test_the_status_can_be_read_back() -> None:
    box = Box()
    box.program(0, 2, 1000)
    box.bus.write(0x43, 1, 0xE2)
    assert box.bus.read(0x40, 1) & 0x3F == 0x34


def test_the_state_travels() -> None:
    here, there = Box(), Box()
    here.program(0, 2, 11932)
    here.now_ns = there.now_ns = 4 * MS
    there.pit.load(here.pit.save(), 3)
    assert there.timer.at_ns == here.timer.at_ns
    assert there.pit.save() == here.pit.save()
    assert there.counter(0) == here.counter(0)


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("count", 0x10001), ("mode", 6), ("gate", 2)])
def test_an_impossible_state_is_refused(name: str, value: int) -> None:
    box = Box()
    values = box.pit.save()
    values["channels"][1][name] = value
    with pytest.raises(VMStateError, match=rf"channels\[1\].{name}"):
        box.pit.load(values, 3)


def test_nothing_wakes_an_idle_machine_before_the_guest_asks() -> None:
    box = Box()
    assert box.timer.at_ns is None
    assert not box.pit.is_used
