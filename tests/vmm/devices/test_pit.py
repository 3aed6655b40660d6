"""The timer counts as an 8254 does, and asks for its interrupt at the right instants."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.clock import VirtualClock
from vmm.cpu import _engine as _module
from vmm.devices.bus import PortBus
from vmm.devices.pit import NAMES, PIT_HZ, Pit
from vmm.errors import VMStateError
from vmm.timers import Timers

MS = 1_000_000
_engine: Any = _module


class Line:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.pulses = 0
        self.owed = 0

    def set_level(self, level: bool) -> None:
        self.levels.append(level)

    def pulse(self, count: int, limit: int) -> None:
        self.pulses += min(count, limit)

    def forgive(self) -> None:
        self.owed = 0


class Box:
    """A timer whose clock is turned by hand."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.bus = PortBus()
        self.line = Line()
        self.pit = Pit(self.bus, Timers(VirtualClock()), lambda: self.now_ns, self.line)
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


@pytest.mark.parametrize(("mode"), [2, 3], ids=["rate generator", "square wave"])
def test_a_periodic_timer_comes_each_period(mode: int) -> None:
    box = Box()
    box.program(0, mode, 11932)  # 10 ms
    box.line.levels.clear()
    at = []
    for _ in range(5):
        box.fire()
        at.append(box.now_ns)
    assert [round(each / MS) for each in at] == [10, 20, 30, 40, 50]
    assert box.line.pulses == 5


def test_a_late_timer_makes_up_for_what_is_over() -> None:
    box = Box()
    box.program(0, 2, 11932)
    box.now_ns = 95 * MS
    box.timer.callback()
    assert box.line.pulses == 9
    assert box.timer.at_ns is not None
    assert round(box.timer.at_ns / MS) == 100


def test_of_a_long_delay_one_second_is_made_up_for() -> None:
    box = Box()
    box.program(0, 2, 11932)
    box.now_ns = 60_000 * MS
    box.timer.callback()
    assert box.line.pulses == 99


def test_what_the_guest_has_yet_to_get_travels() -> None:
    here, there = Box(), Box()
    here.program(0, 2, 11932)
    here.now_ns = there.now_ns = 95 * MS
    here.timer.callback()
    here.line.owed = 8
    there.pit.load(here.pit.save(), 3)
    there.timer.callback()
    assert there.line.pulses == 8


def test_a_timer_that_is_programmed_anew_owes_nothing() -> None:
    box = Box()
    box.program(0, 2, 11932)
    box.line.owed = 8
    box.program(0, 2, 11932)
    assert box.line.owed == 0


def test_a_timer_that_went_off_while_the_guest_programmed_it_anew_is_no_interrupt() -> None:
    box = Box()
    box.program(0, 4, 1193)
    box.now_ns = 2 * MS
    box.program(0, 4, 1193)
    box.line.levels.clear()
    box.timer.callback()
    assert box.line.levels == []
    assert box.timer.at_ns is not None


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


def test_the_instant_at_which_stock_ends_a_pulse_is_no_interrupt() -> None:
    box = Box()
    box.program(0, 2, 11932)
    values = box.pit.save()
    rise = values["channels[0].next_transition_time"]
    values["channels[0].next_transition_time"] = rise + 1_000_000_000 // PIT_HZ + 1
    box.pit.load(values, 3)
    assert box.timer.at_ns == pytest.approx(2 * rise, abs=2)
    values["channels[0].next_transition_time"] = rise - 1  # stock rounds down
    box.pit.load(values, 3)
    assert box.timer.at_ns == rise - 1


BYTES = st.integers(0, 255)
STEP = st.one_of(
    st.tuples(st.just("write"), st.sampled_from((0x40, 0x41, 0x42, 0x61)), BYTES),
    st.tuples(
        st.just("write"), st.just(0x43), st.one_of(BYTES, st.sampled_from((0x34, 0xB0, 0xB6, 0xC2, 0xE8)))
    ),
    st.tuples(st.just("read"), st.sampled_from((0x40, 0x41, 0x42, 0x61)), st.just(0)),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 100 * MS)),
)


@given(steps=st.lists(STEP, max_size=40))
def test_the_engine_reads_as_the_model_does(steps: list[tuple[str, int, int]]) -> None:
    box = Box()
    engine_registers = _engine.ffi.new("struct pf_pit *")
    other = Pit(PortBus(), Timers(VirtualClock()), lambda: box.now_ns, Line(), engine_registers)
    for kind, port, value in steps:
        if kind == "wait":
            box.now_ns += value
        elif kind == "write":
            box.bus.write(port, 1, value)
            if port == 0x61:
                other._write_speaker(0, 1, value)
            else:
                other._write(port - 0x40, 1, value)
        else:
            assert box.bus.read(port, 1) == _engine.lib.pf_pit_read(engine_registers, port, box.now_ns)
    assert other.save() == box.pit.save()


def test_the_names_are_those_of_the_engine() -> None:
    assert [name for name, _ in _engine.ffi.typeof("struct pf_pit_channel").fields] == list(NAMES)


def test_nothing_wakes_an_idle_machine_before_the_guest_asks() -> None:
    box = Box()
    assert box.timer.at_ns is None
    assert not box.pit.is_used
