"""timer, cpu_common, cpu and globalstate on a stand-in for the engine."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.clock import VirtualClock
from vmm.errors import VMStateError
from vmm.machine_sections import CpuCommonSection, CpuSection, GlobalStateSection, TimerSection
from vmm.run_state import RunState
from vmm.vmstate import BytesSource, Values, decode, encode


class Engine:
    """Holds what travels."""

    def __init__(self) -> None:
        self.halted = False
        self.cpu_ticks_offset = 0
        self.values: Values = {}
        self.interrupt_request = 0

    def inject_nmi(self) -> None:
        self.interrupt_request |= 0x200

    def get_cpu_state(self) -> Values:
        return self.values

    def set_cpu_state(self, values: Values, /) -> None:
        self.values = values
        self.halted = False


def over_the_wire(section: Any, other: Any) -> None:
    data = encode(section.description, section.save())
    version = section.description.version
    other.load(decode(section.description, BytesSource(data), version), version)


@pytest.mark.parametrize("ticks", [0, 5, -5, 2**63 + 5])
def test_timer(ticks: int) -> None:
    here, there = Engine(), Engine()
    here.cpu_ticks_offset = ticks
    clock, other_clock = VirtualClock(), VirtualClock()
    clock.offset = 77
    over_the_wire(TimerSection(here, clock), TimerSection(there, other_clock))
    assert (there.cpu_ticks_offset - ticks) % 2**64 == 0
    assert other_clock.offset == 77


@pytest.mark.parametrize("offset", [-(2**63), 2**63 - 1, -(2**61) - 1, 2**61 + 1])
def test_a_clock_too_far_away_to_count_with_is_refused(offset: int) -> None:
    engine, clock = Engine(), VirtualClock()
    clock.offset = 77
    with pytest.raises(VMStateError, match="cpu_clock_offset"):
        TimerSection(engine, clock).load({"cpu_ticks_offset": 5, "cpu_clock_offset": offset}, 2)
    assert (engine.cpu_ticks_offset, clock.offset) == (0, 77)


def test_a_tsc_of_the_upper_half_fits_the_engine() -> None:
    engine = Engine()
    CpuSection(engine).load({"env.tsc": 2**64 - 1, "env.tsc_offset": 0}, 12)
    assert engine.cpu_ticks_offset == -1


def test_halted_survives_the_registers_that_come_after_it() -> None:
    here, there = Engine(), Engine()
    here.halted = True
    over_the_wire(CpuCommonSection(here), CpuCommonSection(there))
    registers = {"env.tsc": 0, "env.tsc_offset": 0}
    CpuSection(there).load(registers, 12)
    assert there.halted
    assert CpuSection(there).save() == registers


@pytest.mark.parametrize(
    ("ticks", "offset", "kvm", "read"),
    [(100, 0, 0, 100), (100, 20, 0, 120), (100, 0, 5000, 5000), (100, 20, 5000, 5000), (100, -90, 7, 10)],
)
def test_the_tsc_is_the_later_one_of_the_two_that_travel(
    ticks: int, offset: int, kvm: int, read: int
) -> None:
    engine = Engine()
    engine.cpu_ticks_offset = ticks
    CpuSection(engine).load({"env.tsc": kvm, "env.tsc_offset": offset % 2**64}, 12)
    assert CpuSection(engine).save()["env.tsc"] == read


def test_a_pending_nmi_travels_and_a_pending_interrupt_is_told_to_a_peer_that_does_not_ask() -> None:
    here, there = Engine(), Engine()
    here.interrupt_request = 0x202
    over_the_wire(CpuCommonSection(here), CpuCommonSection(there))
    assert CpuCommonSection(here).save()["interrupt_request"] == 0x202
    assert there.interrupt_request == 0x200


@pytest.mark.parametrize("state", [RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH, RunState.SHUTDOWN])
def test_globalstate(state: RunState) -> None:
    here, there = GlobalStateSection(), GlobalStateSection()
    here.stored = state
    over_the_wire(here, there)
    assert there.received is state
    assert here.save()["size"] == len(state) + 1


@pytest.mark.parametrize("text", [b"nonsense", b"inmigrate", b"\xff" * 100, b""])
def test_an_unknown_run_state_is_refused(text: bytes) -> None:
    with pytest.raises(VMStateError):
        GlobalStateSection().load({"size": 1, "runstate": text.ljust(100, b"\0")}, 1)
