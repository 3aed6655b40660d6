"""The 8254 timer: a plain model, and its section.

Channel 0 makes interrupt 0, channel 2 is gated by port 0x61, as on a PC.

    clock input 1,193,182 Hz -> counter -> output
    mode 0, 1, 4, 5: once      2: a pulse each `count`      3: a square wave of period `count`

A counter is no loop: what it shows follows from when it was loaded and the guest's time now. It lives in the
engine, in C (vmm/cpu/pit.c), since guests measure their clocks by reading it, and one that sleeps programs it
for each wake-up. `PitModel` says the same in Python; a test drives both with the same accesses.

A guest that counts the interrupts of a periodic timer shall have them all, or its time falls behind: those
for which the host had no time come later, one after the other. The interrupt controller's input is edge
triggered: but for mode 0 the line is taken back as soon as it was raised.

Source: Intel 8254 data sheet; section `i8254` version 3 and what the data sheet leaves open as in QEMU 7.2
(hw/timer/i8254.c, i8254_common.c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vmm.devices.bus import PortBus
from vmm.errors import VMStateError
from vmm.vmstate import Description, Field, Values

__all__ = ["PIT_DESCRIPTION", "PIT_HZ", "Channel", "Due", "Pit", "PitModel"]

PIT_HZ = 1193182
NS_PER_S = 1_000_000_000
FIRST_PORT = 0x40
SPEAKER_PORT = 0x61
COMMAND_PORT = 0x43
TIMER_IRQ = 0
NEVER = -1
BACKLOG_NS = NS_PER_S
"""How much of a periodic timer's time is made up for after a delay. Arbitrary."""

GATE2, SPEAKER_DATA, REFRESH, OUT2 = 0x01, 0x02, 0x10, 0x20
LOW, HIGH, WORD_LOW, WORD_HIGH = 1, 2, 3, 4

PIT_CHANNEL = Description(
    "pit channel",
    2,
    2,
    (
        Field("count", "int32"),
        Field("latched_count", "uint16"),
        *(
            Field(name, "uint8")
            for name in (
                "count_latched", "status_latched", "status", "read_state", "write_state",
                "write_latch", "rw_mode", "mode", "bcd", "gate",
            )
        ),
        Field("count_load_time", "int64"),
        Field("next_transition_time", "int64"),
    ),
)  # fmt: skip
PIT_DESCRIPTION = Description(
    "i8254",
    3,
    3,
    (
        Field("channels[0].irq_disabled", "uint32"),
        Field("channels", "struct", 3, PIT_CHANNEL),
        Field("channels[0].next_transition_time", "int64"),
    ),
)


@dataclass
class Channel:
    """One counter, by the names of its section and of `struct pf_pit_channel`; times in ns of guest time."""

    count: int = 0x10000
    latched_count: int = 0
    count_latched: int = 0
    status_latched: int = 0
    status: int = 0
    read_state: int = 0
    write_state: int = 0
    write_latch: int = 0
    rw_mode: int = 0
    mode: int = 3
    bcd: int = 0
    gate: int = 1
    count_load_time: int = 0
    next_transition_time: int = NEVER


@dataclass(frozen=True)
class Due:
    """What channel 0 asks of interrupt line 0, by the names of `struct pf_pit_due`."""

    count: int = 1
    limit: int = 0
    """Of a periodic timer: how many are kept back at most."""
    stays_high: int = 0


def ticks(channel: Channel, now_ns: int) -> int:
    """Clock ticks since the count was loaded."""
    return max(now_ns - channel.count_load_time, 0) * PIT_HZ // NS_PER_S


def counter(channel: Channel, now_ns: int) -> int:
    """What a read of the counter shows."""
    passed = ticks(channel, now_ns)
    if channel.mode == 2:
        passed %= channel.count
    elif channel.mode == 3:
        passed = 2 * passed % channel.count
    return (channel.count - passed) & 0xFFFF


def output(channel: Channel, now_ns: int) -> bool:
    """The output's level."""
    passed = ticks(channel, now_ns)
    match channel.mode:
        case 0:
            return passed >= channel.count
        case 1:
            return passed < channel.count
        case 2:
            return passed % channel.count == 0 and passed != 0
        case 3:
            return passed % channel.count < (channel.count + 1) // 2
    return passed == channel.count


def next_rise(channel: Channel, now_ns: int) -> int:
    """When the output rises next, or NEVER. In mode 1 it rises with the gate only."""
    passed = ticks(channel, now_ns)
    if channel.mode in (2, 3):
        target = (passed // channel.count + 1) * channel.count
    elif channel.mode == 1 or passed >= channel.count:
        return NEVER
    else:
        target = channel.count
    return channel.count_load_time - -target * NS_PER_S // PIT_HZ


class PitModel:
    """All three channels, and port 0x61."""

    def __init__(self) -> None:
        self.channels = [Channel(gate=int(number < 2)) for number in range(3)]
        self.speaker = self.refresh = 0
        self.started = 0
        """Was channel 0 programmed? An idle guest that never did is not woken up 18 times a second."""

    def registers(self) -> Values:
        """By the names of `struct pf_pit`."""
        return vars(self) | {"channels": [dict(vars(channel)) for channel in self.channels]}

    def read(self, port: int, now_ns: int) -> int:
        """IN."""
        if port == COMMAND_PORT:
            return 0
        if port == SPEAKER_PORT:
            second = self.channels[2]
            self.refresh ^= REFRESH
            out = OUT2 if output(second, now_ns) else 0
            return second.gate | self.speaker | self.refresh | out
        channel = self.channels[port - FIRST_PORT]
        if channel.status_latched:
            channel.status_latched = 0
            return channel.status
        if part := channel.count_latched:
            channel.count_latched = HIGH if part == WORD_LOW else 0
            return channel.latched_count >> 8 if part in (HIGH, WORD_HIGH) else channel.latched_count & 0xFF
        count, state = counter(channel, now_ns), channel.read_state
        if state in (WORD_LOW, WORD_HIGH):
            channel.read_state = WORD_HIGH if state == WORD_LOW else WORD_LOW
        return count >> 8 if state in (HIGH, WORD_HIGH) else count & 0xFF

    def write(self, port: int, value: int, now_ns: int) -> bool:
        """OUT. True: channel 0 has begun anew; its line is low, and nothing of before is owed."""
        if port == SPEAKER_PORT:
            self._write_speaker(value, now_ns)
            return False
        if port == COMMAND_PORT:
            self._command(value, now_ns)
            return False
        number = port - FIRST_PORT
        channel = self.channels[number]
        match channel.write_state or channel.rw_mode:
            case 2:
                return self._start(number, value << 8, now_ns)
            case 3:
                channel.write_latch = value
                channel.write_state = WORD_HIGH
                return False
            case 4:
                channel.write_state = WORD_LOW
                return self._start(number, channel.write_latch | value << 8, now_ns)
        return self._start(number, value, now_ns)

    def take(self, now_ns: int) -> Due | None:
        """The interrupt, if it is due; when the next one is has been noted."""
        channel = self.channels[0]
        at_ns = channel.next_transition_time
        if at_ns == NEVER or at_ns > now_ns:
            return None
        channel.next_transition_time = next_rise(channel, now_ns)
        if channel.mode not in (2, 3):
            return Due(stays_high=int(channel.mode == 0))
        period_ns = _period_ns(channel)
        limit = max(BACKLOG_NS // period_ns, 1)
        return Due(min((now_ns - at_ns) // period_ns + 1, limit), limit)

    def _start(self, number: int, count: int, now_ns: int) -> bool:
        channel = self.channels[number]
        channel.count_load_time = now_ns
        channel.count = count or 0x10000
        if number:
            return False
        self.started = 1
        channel.next_transition_time = next_rise(channel, now_ns)
        return True

    def _command(self, value: int, now_ns: int) -> None:
        number, access = value >> 6, value >> 4 & 3
        if number == 3:
            self._read_back(value, now_ns)
            return
        channel = self.channels[number]
        if access == 0:
            self._latch(channel, now_ns)
            return
        channel.rw_mode = channel.read_state = channel.write_state = access
        channel.mode = value >> 1 & 7
        if channel.mode > 5:
            channel.mode -= 4  # bit 2 is a don't-care for modes 2 and 3
        channel.bcd = value & 1

    def _read_back(self, value: int, now_ns: int) -> None:
        for number, channel in enumerate(self.channels):
            if not value & 2 << number:
                continue
            if not value & 0x20:
                self._latch(channel, now_ns)
            if not value & 0x10 and not channel.status_latched:
                high = output(channel, now_ns)
                channel.status = high << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd
                channel.status_latched = 1

    def _latch(self, channel: Channel, now_ns: int) -> None:
        if not channel.count_latched:
            channel.latched_count = counter(channel, now_ns)
            channel.count_latched = channel.rw_mode

    def _write_speaker(self, value: int, now_ns: int) -> None:
        channel, gate = self.channels[2], value & GATE2
        self.speaker = value & SPEAKER_DATA
        if gate and not channel.gate and channel.mode in (1, 2, 3, 5):
            channel.count_load_time = now_ns
        channel.gate = gate


class PitRegisters(Protocol):
    """What the engine offers."""

    def get_pit(self) -> dict[str, Any]: ...
    def set_pit(self, registers: Mapping[str, Any], /) -> None: ...
    def read_pit(self, port: int, /) -> int: ...
    def write_pit(self, port: int, value: int, /) -> None: ...
    def owed_irqs(self, irq: int, /) -> int: ...


class Pit:
    """The engine's timer as a device: its ports for accesses wider than a byte, its reset, its section."""

    idstr = "i8254"
    instance_id = 0
    description = PIT_DESCRIPTION

    def __init__(self, bus: PortBus, engine: PitRegisters) -> None:
        """Raises DeviceError if a port is taken."""
        self._engine = engine
        self.reset()

        def add(name: str, first: int, count: int) -> None:
            def write(offset: int, size: int, value: int) -> None:
                engine.write_pit(first + offset, value)

            bus.add(name, first, count, lambda offset: engine.read_pit(first + offset), write)

        add("i8254", FIRST_PORT, 4)
        add("pcspk", SPEAKER_PORT, 1)

    def reset(self) -> None:
        """As after power-on. The vCPU does not run."""
        self._engine.set_pit(PitModel().registers())

    @property
    def is_used(self) -> bool:
        """Has the guest programmed channel 0?"""
        return bool(self._engine.get_pit()["started"])

    def save(self) -> Values:
        channels = self._engine.get_pit()["channels"]
        # A peer makes up for those that the guest has yet to get, too.
        owed_ns = self._engine.owed_irqs(TIMER_IRQ) * _period_ns(Channel(**channels[0]))
        channels[0]["next_transition_time"] -= owed_ns
        return {
            "channels[0].irq_disabled": 0,
            "channels": channels,
            "channels[0].next_transition_time": channels[0]["next_transition_time"],
        }

    def load(self, values: Values, version: int) -> None:
        """Raises VMStateError for a state that no 8254 can be in; then nothing was changed."""
        for number in range(3):
            _check(number, values["channels"][number])
        channels = [Channel(**{name: int(each[name]) for name in _NAMES}) for each in values["channels"]]
        channels[0].next_transition_time = _next_interrupt(channels[0], values)
        registers = self._engine.get_pit()
        registers |= {"channels": [vars(channel) for channel in channels], "started": 1}
        self._engine.set_pit(registers)


def _next_interrupt(channel: Channel, values: Values) -> int:
    """When a timer that comes from elsewhere makes its next interrupt."""
    at_ns = int(values["channels[0].next_transition_time"])
    if at_ns == NEVER or values["channels[0].irq_disabled"]:
        return NEVER
    if output(channel, at_ns + 1):  # + 1: stock rounds down
        return at_ns
    return next_rise(channel, at_ns)  # it is where stock would end a pulse


def _period_ns(channel: Channel) -> int:
    return channel.count * NS_PER_S // PIT_HZ


_NAMES = tuple(vars(Channel()))
_LIMITS = {
    "count": 0x10000, "count_latched": 4, "read_state": 4, "write_state": 4, "rw_mode": 3, "mode": 5,
    "gate": 1,
}  # fmt: skip
_TIMES = ("count_load_time", "next_transition_time")
_FAR_NS = 1 << 62
"""Arbitrary: 146 years either way."""


def _check(number: int, values: Mapping[str, Any]) -> None:
    ranges = {name: (int(name == "count"), limit) for name, limit in _LIMITS.items()}
    ranges |= dict.fromkeys(_TIMES, (-_FAR_NS, _FAR_NS))
    for name, (first, last) in ranges.items():
        if not first <= values[name] <= last:
            raise VMStateError(
                "Impossible counter",
                f"i8254.channels[{number}].{name}",
                expected=f"{first} to {last}",
                got=values[name],
            )
