"""The timer counts as an 8254 does, and asks for its interrupt at the right instants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cpu import _engine as _module
from vmm.devices.bus import PortBus
from vmm.devices.pit import PIT_HZ, Channel, Due, Pit, PitModel
from vmm.errors import VMStateError

MS = 1_000_000
_engine: Any = _module
ffi, lib = _engine.ffi, _engine.lib


class Box:
    """A timer whose clock is turned by hand."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.model = PitModel()

    def write(self, port: int, value: int) -> bool:
        return self.model.write(port, value, self.now_ns)

    def read(self, port: int) -> int:
        return self.model.read(port, self.now_ns)

    def program(self, channel: int, mode: int, count: int) -> bool:
        """Does the last write begin channel 0 anew?"""
        self.write(0x43, channel << 6 | 0x30 | mode << 1)
        self.write(0x40 + channel, count & 0xFF)
        return self.write(0x40 + channel, count >> 8)

    def counter(self, channel: int) -> int:
        self.write(0x43, channel << 6)
        return self.read(0x40 + channel) | self.read(0x40 + channel) << 8

    @property
    def at_ns(self) -> int:
        return self.model.channels[0].next_transition_time

    def take(self) -> Due | None:
        return self.model.take(self.now_ns)


class Registers:
    """The engine's side: registers, and pulses that it keeps back."""

    def __init__(self) -> None:
        self.pit: dict[str, Any] = {}
        self.owed = 0

    def get_pit(self) -> dict[str, Any]:
        return self.pit | {"channels": [dict(channel) for channel in self.pit["channels"]]}

    def set_pit(self, registers: Mapping[str, Any]) -> None:
        self.pit = dict(registers)
        self.owed = 0

    def read_pit(self, port: int) -> int:
        return port & 0xF

    def write_pit(self, port: int, value: int) -> None:
        self.pit["written"] = port, value

    def owed_irqs(self, irq: int) -> int:
        return self.owed


def programmed(mode: int, count: int, now_ns: int = 0) -> tuple[Pit, Registers]:
    """By a guest at 0; what was due until now has been taken."""
    box, registers = Box(), Registers()
    pit = Pit(PortBus(), registers)
    box.program(0, mode, count)
    box.now_ns = now_ns
    box.take()
    registers.set_pit(box.model.registers())
    return pit, registers


@pytest.mark.parametrize(("mode"), [2, 3], ids=["rate generator", "square wave"])
def test_a_periodic_timer_comes_each_period(mode: int) -> None:
    box = Box()
    box.program(0, mode, 11932)  # 10 ms
    at = []
    for _ in range(5):
        box.now_ns = box.at_ns
        assert box.take() == Due(1, 99)
        at.append(box.now_ns)
    assert [round(each / MS) for each in at] == [10, 20, 30, 40, 50]


def test_it_is_not_due_before_its_time() -> None:
    box = Box()
    assert box.take() is None
    box.program(0, 2, 11932)
    box.now_ns = box.at_ns - 1
    assert box.take() is None


def test_a_late_timer_makes_up_for_what_is_over() -> None:
    box = Box()
    box.program(0, 2, 11932)
    box.now_ns = 95 * MS
    assert box.take() == Due(9, 99)
    assert round(box.at_ns / MS) == 100


def test_of_a_long_delay_one_second_is_made_up_for() -> None:
    box = Box()
    box.program(0, 2, 11932)
    box.now_ns = 60_000 * MS
    assert box.take() == Due(99, 99)


def test_a_timer_that_is_programmed_anew_says_so_and_is_not_due() -> None:
    box = Box()
    assert box.program(0, 4, 1193)
    box.now_ns = 2 * MS
    assert box.program(0, 4, 1193)
    assert box.take() is None
    assert not box.program(2, 4, 1193)


@pytest.mark.parametrize(("mode", "stays_high"), [(0, 1), (4, 0)])
def test_a_one_shot_comes_once(mode: int, stays_high: int) -> None:
    box = Box()
    box.program(0, mode, 1193)  # 1 ms
    box.now_ns = box.at_ns
    assert round(box.now_ns / MS) == 1
    assert box.take() == Due(stays_high=stays_high)
    box.now_ns += 1000 * MS
    assert box.take() is None


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_the_counter_counts_down(mode: int) -> None:
    box = Box()
    box.program(2, mode, 0x8000)
    box.now_ns = 1000 * 1_000_000_000 // PIT_HZ + 1
    assert box.counter(2) == 0x8000 - (2000 if mode == 3 else 1000)


def test_the_output_of_channel_2_is_read_at_port_0x61() -> None:
    box = Box()
    box.write(0x61, 1)
    box.program(2, 0, 1193)
    assert not box.read(0x61) & 0x20
    box.now_ns = 2 * MS
    assert box.read(0x61) & 0x20
    assert box.read(0x61) & 0x01


def test_the_status_can_be_read_back() -> None:
    box = Box()
    box.program(0, 2, 1000)
    box.write(0x43, 0xE2)
    assert box.read(0x40) & 0x3F == 0x34


PORTS = st.sampled_from((0x40, 0x41, 0x42, 0x43, 0x61))
BYTES = st.integers(0, 255)
COMMANDS = st.sampled_from((0x30, 0x34, 0x36, 0x38, 0xB0, 0xB6, 0xC2, 0xE8))
STEP = st.one_of(
    st.tuples(st.just("write"), PORTS, BYTES),
    st.tuples(st.just("write"), st.just(0x43), COMMANDS),
    st.tuples(st.just("read"), PORTS, st.just(0)),
    st.tuples(st.sampled_from(("wait", "take")), st.just(0), st.integers(0, 100 * MS)),
    st.tuples(st.just("take"), st.just(0), st.integers(0, 60_000 * MS)),
)


@given(steps=st.lists(STEP, max_size=40))
def test_the_engine_does_as_the_model_does(steps: list[tuple[str, int, int]]) -> None:
    box, due = Box(), ffi.new("struct pf_pit_due *")
    pit = ffi.new("struct pf_pit *", box.model.registers())
    for kind, port, value in steps:
        if kind == "write":
            assert lib.pf_pit_write(pit, port, value, box.now_ns) == box.write(port, value)
        elif kind == "read":
            assert lib.pf_pit_read(pit, port, box.now_ns) == box.read(port)
        else:
            box.now_ns += value
        if kind == "take":
            taken = box.take()
            assert lib.pf_pit_take(pit, box.now_ns, due) == (taken is not None)
            if taken is not None:
                assert (due.count, due.limit, due.stays_high) == (
                    taken.count,
                    taken.limit,
                    taken.stays_high,
                )
    names = [name for name, _ in ffi.typeof("struct pf_pit_channel").fields]
    assert names == list(vars(Channel()))
    for number, channel in enumerate(box.model.channels):
        assert {name: getattr(pit.channels[number], name) for name in names} == vars(channel)
    model = box.model
    assert (pit.speaker, pit.refresh, pit.started) == (model.speaker, model.refresh, model.started)


def test_nothing_wakes_an_idle_machine_before_the_guest_asks() -> None:
    pit = Pit(PortBus(), Registers())
    assert not pit.is_used
    assert pit.save()["channels[0].next_transition_time"] == -1


def test_accesses_wider_than_a_byte_go_port_by_port() -> None:
    bus, registers = PortBus(), Registers()
    Pit(bus, registers)
    assert bus.read(0x40, 4) == 0x03020100
    bus.write(0x60, 2, 0x0300)
    assert registers.pit["written"] == (0x61, 3)


def test_what_the_guest_has_yet_to_get_travels() -> None:
    pit, registers = programmed(2, 11932, 95 * MS)
    before = pit.save()["channels[0].next_transition_time"]
    registers.owed = 8
    after = pit.save()["channels[0].next_transition_time"]
    assert round((before - after) / MS) == 80
    there = Registers()
    Pit(PortBus(), there).load(pit.save(), 3)
    assert there.pit["channels"][0]["next_transition_time"] == after


def test_the_state_travels() -> None:
    pit, registers = programmed(2, 11932)
    there = Registers()
    other = Pit(PortBus(), there)
    other.load(pit.save(), 3)
    assert there.pit == registers.pit
    assert other.save() == pit.save()
    assert other.is_used


def test_a_timer_that_may_not_interrupt_does_not() -> None:
    pit, registers = programmed(2, 11932)
    pit.load(pit.save() | {"channels[0].irq_disabled": 1}, 3)
    assert registers.pit["channels"][0]["next_transition_time"] == -1


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 0), ("count", 0x10001), ("mode", 6), ("gate", 2), ("count_load_time", -(1 << 63))],
)
def test_an_impossible_state_is_refused(name: str, value: int) -> None:
    pit, registers = programmed(2, 11932)
    values, before = pit.save(), registers.get_pit()
    values["channels"][1][name] = value
    with pytest.raises(VMStateError, match=rf"channels\[1\].{name}"):
        pit.load(values, 3)
    assert registers.pit == before


def test_the_instant_at_which_stock_ends_a_pulse_is_no_interrupt() -> None:
    pit, registers = programmed(2, 11932)
    values = pit.save()
    rise = values["channels[0].next_transition_time"]

    def loaded(at_ns: int) -> int:
        pit.load(values | {"channels[0].next_transition_time": at_ns}, 3)
        return int(registers.pit["channels"][0]["next_transition_time"])

    assert loaded(rise + 1_000_000_000 // PIT_HZ + 1) == pytest.approx(2 * rise, abs=2)
    assert loaded(rise - 1) == rise - 1  # stock rounds down
