"""The machine's sections in the stream that belong to no device: timer, cpu_common, cpu, globalstate.

    timer v2          cpu_ticks_offset, cpu_clock_offset: the guest's TSC and clock while it is stopped
    cpu_common v1     halted, interrupt_request
    cpu v12           the vCPU's registers
    globalstate v1    the run state the guest had before the migration stopped it

Sources: QEMU 7.2 softmmu/cpu-timers.c, cpu.c, target/i386/machine.c, migration/global_state.c.
"""

from __future__ import annotations

from typing import Protocol

from vmm.clock import VirtualClock
from vmm.cpu.state import CPU_COMMON_DESCRIPTION, CPU_DESCRIPTION
from vmm.errors import VMStateError
from vmm.run_state import LEGAL_MOVES, RunState
from vmm.vmstate import Description, Field, Values

__all__ = ["CpuCommonSection", "CpuSection", "EngineState", "GlobalStateSection", "TimerSection"]

NMI_INTERRUPT = 0x200
RUN_STATE_BYTES = 100
TSC_MASK = (1 << 64) - 1
FAR_NS = 1 << 61
"""Arbitrary: 73 years either way, so that sums with a device's times (vmm/devices/pit.py) are no overflow."""


class EngineState(Protocol):
    """What of the CPU engine travels."""

    halted: bool
    cpu_ticks_offset: int

    @property
    def interrupt_request(self) -> int: ...
    def inject_nmi(self) -> None: ...
    def get_cpu_state(self) -> Values: ...
    def set_cpu_state(self, values: Values, /) -> None: ...


def _signed(ticks: int) -> int:
    ticks &= TSC_MASK
    return ticks - (1 << 64) if ticks >> 63 else ticks


class TimerSection:
    """Saved and loaded with the clocks stopped."""

    idstr = "timer"
    instance_id = 0
    description = Description(
        "timer",
        2,
        1,
        (
            Field("cpu_ticks_offset", "int64"),
            Field("unused", "unused", 8),
            Field("cpu_clock_offset", "int64", since=2),
        ),
    )

    def __init__(self, engine: EngineState, clock: VirtualClock) -> None:
        self._engine = engine
        self._clock = clock

    def save(self) -> Values:
        ticks = _signed(self._engine.cpu_ticks_offset)
        return {"cpu_ticks_offset": ticks, "cpu_clock_offset": self._clock.offset}

    def load(self, values: Values, version: int) -> None:
        """Raises VMStateError for a clock that no guest can have; then nothing was changed."""
        clock_ns = values.get("cpu_clock_offset", 0)
        if not -FAR_NS <= clock_ns <= FAR_NS:
            raise VMStateError(
                "Impossible clock",
                "timer.cpu_clock_offset",
                expected=f"{-FAR_NS} to {FAR_NS}",
                got=clock_ns,
            )
        self._engine.cpu_ticks_offset = values["cpu_ticks_offset"]
        self._clock.offset = clock_ns


class CpuCommonSection:
    """Halted or not, and which interrupts the CPU has yet to take.

    A stock peer does not ask its controllers when it has loaded them. Here they are asked: of what comes,
    only the NMI is news.
    """

    idstr = "cpu_common"
    instance_id = 0
    description = CPU_COMMON_DESCRIPTION

    def __init__(self, engine: EngineState) -> None:
        self._engine = engine

    def save(self) -> Values:
        return {"halted": int(self._engine.halted), "interrupt_request": self._engine.interrupt_request}

    def load(self, values: Values, version: int) -> None:
        if values["interrupt_request"] & NMI_INTERRUPT:
            self._engine.inject_nmi()
        self._engine.halted = bool(values["halted"])


class CpuSection:
    """The registers; loading drops translated code and the TLB.

    The TSC travels twice: in `timer`, which TCG obeys, and in the field env.tsc, which KVM does. A peer
    leaves the one that it does not obey as it was, so the later of both is right: a TSC never goes backwards.
    """

    idstr = "cpu"
    instance_id = 0
    description = CPU_DESCRIPTION

    def __init__(self, engine: EngineState) -> None:
        self._engine = engine

    def save(self) -> Values:
        values = self._engine.get_cpu_state()
        values["env.tsc"] = self._tsc(values)
        return values

    def _tsc(self, values: Values) -> int:
        """What the guest would read, with its clocks stopped."""
        return (self._engine.cpu_ticks_offset + int(values["env.tsc_offset"])) & TSC_MASK

    def load(self, values: Values, version: int) -> None:
        halted = self._engine.halted  # cpu_common has been before
        self._engine.set_cpu_state(values)
        ahead = values["env.tsc"] - self._tsc(values)  # `timer` has been before, too
        if ahead > 0:
            self._engine.cpu_ticks_offset = _signed(self._engine.cpu_ticks_offset + ahead)
        self._engine.halted = halted


class GlobalStateSection:
    """`stored` is what travels, `received` what a source said, None until then."""

    idstr = "globalstate"
    instance_id = 0
    description = Description(
        "globalstate", 1, 1, (Field("size", "uint32"), Field("runstate", "buffer", RUN_STATE_BYTES))
    )

    def __init__(self) -> None:
        self.stored = RunState.RUNNING
        self.received: RunState | None = None

    def save(self) -> Values:
        text = self.stored.value.encode("ascii")
        return {"size": len(text) + 1, "runstate": text.ljust(RUN_STATE_BYTES, b"\0")}

    def load(self, values: Values, version: int) -> None:
        text = values["runstate"].partition(b"\0")[0].decode("ascii", "replace")
        try:
            state = RunState(text)
        except ValueError:
            state = RunState.INMIGRATE
        if state not in LEGAL_MOVES[RunState.INMIGRATE]:
            raise VMStateError("Unknown run state", "globalstate.runstate", got=repr(text))
        self.received = state
