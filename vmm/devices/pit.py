"""The 8254 timer: channel 0 makes interrupt 0, channel 2 is gated by port 0x61, as on a PC.

    clock input 1,193,182 Hz -> counter -> output
    mode 0, 1, 4, 5: once      2: a pulse each `count`      3: a square wave of period `count`

A counter is no loop: what it shows follows from when it was loaded and the guest's time now. Reads are
answered in C (vmm/cpu/pit.c), since guests measure their clocks by them. `read` here says the same; a test
holds both equal.

A guest that counts the interrupts of a periodic timer shall have them all, or its time falls behind: those
for which the host had no time come later, one after the other. The interrupt controller's input is edge
triggered: but for mode 0 the line is taken back as soon as it was raised.

Source: Intel 8254 data sheet; section `i8254` version 3 and what the data sheet leaves open as in QEMU 7.2
(hw/timer/i8254.c, i8254_common.c).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from vmm.devices.bus import PortBus
from vmm.errors import VMStateError
from vmm.timers import Timers
from vmm.vmstate import Description, Field, Values

__all__ = ["NAMES", "PIT_DESCRIPTION", "PIT_HZ", "Channel", "Pit", "Registers", "TimerLine", "read"]

PIT_HZ = 1193182
NS_PER_S = 1_000_000_000
FIRST_PORT = 0x40
SPEAKER_PORT = 0x61
COMMAND = 3
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


@dataclass
class Registers:
    """What the ports show; `struct pf_pit` of the engine has the same names."""

    channels: list[Channel] = field(default_factory=lambda: [Channel(), Channel(), Channel(gate=0)])
    speaker: int = 0
    refresh: int = 0


NAMES = tuple(each.name for each in fields(Channel))


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


def read(registers: Registers, port: int, now_ns: int) -> int:
    """IN, as the engine answers it in C (vmm/cpu/pit.c)."""
    if port == SPEAKER_PORT:
        channel = registers.channels[2]
        registers.refresh ^= REFRESH
        out = OUT2 if output(channel, now_ns) else 0
        return channel.gate | registers.speaker | registers.refresh | out
    channel = registers.channels[port - FIRST_PORT]
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


class TimerLine(Protocol):
    """Interrupt 0. `pulse` raises it again and again, each time when the last one was taken."""

    def set_level(self, level: bool, /) -> None: ...
    def pulse(self, count: int, limit: int, /) -> None: ...
    @property
    def owed(self) -> int:
        """How many pulses are to come."""

    def forgive(self) -> None:
        """Forget them."""


class Pit:
    """All three channels, and port 0x61."""

    idstr = "i8254"
    instance_id = 0
    description = PIT_DESCRIPTION

    def __init__(
        self,
        bus: PortBus,
        timers: Timers,
        now_ns: Callable[[], int],
        irq: TimerLine,
        registers: Registers | None = None,
    ) -> None:
        """`registers` are the engine's, which then answers reads. Raises DeviceError if a port is taken."""
        self._irq = irq
        self._now_ns = now_ns
        self._lock = threading.Lock()  # protects the registers: the vCPU's thread and "timers"
        self._timer = timers.timer(self._fire)
        self._r = registers or Registers()
        self._power_on()
        bus.add("i8254", FIRST_PORT, 4, lambda offset: self._read(FIRST_PORT + offset), self._write)
        bus.add("pcspk", SPEAKER_PORT, 1, lambda offset: self._read(SPEAKER_PORT), self._write_speaker)

    def _power_on(self) -> None:
        # Started or not: an idle guest that never programmed it is not woken up 18 times a second.
        self._started = False
        self._r.speaker = self._r.refresh = 0
        for number in range(3):
            _set(self._r.channels[number], vars(Channel(gate=int(number < 2))))

    def reset(self) -> None:
        """As after power-on. The vCPU does not run."""
        with self._lock:
            self._power_on()
            self._timer.set(None)

    # ---- the interrupt; the thread "timers"

    def _fire(self) -> None:
        with self._lock:
            channel = self._r.channels[0]
            at_ns, now_ns = channel.next_transition_time, self._now_ns()
            if at_ns == NEVER or at_ns > now_ns:
                return  # the guest has programmed it anew since the timer went off
            self._schedule(now_ns)
            if channel.mode in (2, 3):
                period_ns = _period_ns(channel)
                limit = max(BACKLOG_NS // period_ns, 1)
                self._irq.pulse(int((now_ns - at_ns) // period_ns) + 1, int(limit))
                return
            self._irq.set_level(False)  # a peer may have left it high
            self._irq.set_level(True)
            if channel.mode != 0:
                self._irq.set_level(False)

    def _schedule(self, after_ns: int) -> None:
        """The next interrupt later than `after_ns`."""
        channel = self._r.channels[0]
        at_ns = next_rise(channel, after_ns)
        channel.next_transition_time = at_ns
        self._timer.set(None if at_ns == NEVER else at_ns)

    def _start(self, number: int, count: int) -> None:
        channel, now_ns = self._r.channels[number], self._now_ns()
        channel.count_load_time = now_ns
        channel.count = count or 0x10000
        if number == 0:
            self._started = True
            self._irq.forgive()
            self._irq.set_level(False)
            self._schedule(now_ns)

    # ---- ports; the vCPU's thread

    def _write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == COMMAND:
                self._command(value)
                return
            channel = self._r.channels[offset]
            match channel.write_state or channel.rw_mode:
                case 2:
                    self._start(offset, value << 8)
                case 3:
                    channel.write_latch = value
                    channel.write_state = WORD_HIGH
                case 4:
                    channel.write_state = WORD_LOW
                    self._start(offset, channel.write_latch | value << 8)
                case _:
                    self._start(offset, value)

    def _command(self, value: int) -> None:
        number, access = value >> 6, value >> 4 & 3
        if number == 3:
            self._read_back(value)
            return
        channel = self._r.channels[number]
        if access == 0:
            self._latch(channel)
            return
        channel.rw_mode = channel.read_state = channel.write_state = access
        channel.mode = value >> 1 & 7
        if channel.mode > 5:
            channel.mode -= 4  # bit 2 is a don't-care for modes 2 and 3
        channel.bcd = value & 1

    def _read_back(self, value: int) -> None:
        for number in range(3):
            channel = self._r.channels[number]
            if not value & 2 << number:
                continue
            if not value & 0x20:
                self._latch(channel)
            if not value & 0x10 and not channel.status_latched:
                high = output(channel, self._now_ns())
                channel.status = high << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd
                channel.status_latched = 1

    def _latch(self, channel: Channel) -> None:
        if not channel.count_latched:
            channel.latched_count = counter(channel, self._now_ns())
            channel.count_latched = channel.rw_mode

    def _read(self, port: int) -> int:
        if port == FIRST_PORT + COMMAND:
            return 0
        with self._lock:
            return read(self._r, port, self._now_ns())

    def _write_speaker(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            channel, gate = self._r.channels[2], value & GATE2
            self._r.speaker = value & SPEAKER_DATA
            if gate and not channel.gate and channel.mode in (1, 2, 3, 5):
                channel.count_load_time = self._now_ns()
            channel.gate = gate

    # ---- what travels

    @property
    def is_used(self) -> bool:
        """Has the guest programmed channel 0?"""
        return self._started

    def save(self) -> Values:
        with self._lock:
            channels = [_get(self._r.channels[number]) for number in range(3)]
            # A peer makes up for those that the guest has yet to get, too.
            channels[0]["next_transition_time"] -= self._irq.owed * _period_ns(self._r.channels[0])
        return {
            "channels[0].irq_disabled": 0,
            "channels": channels,
            "channels[0].next_transition_time": channels[0]["next_transition_time"],
        }

    def load(self, values: Values, version: int) -> None:
        """Raises VMStateError for a state that no 8254 can be in; then nothing was changed."""
        for number in range(3):
            _check(number, values["channels"][number])
        with self._lock:
            for number in range(3):
                _set(self._r.channels[number], values["channels"][number])
            self._started = True
            self._irq.forgive()
            at_ns = values["channels[0].next_transition_time"]
            self._r.channels[0].next_transition_time = at_ns
            if at_ns == NEVER or values["channels[0].irq_disabled"]:
                self._timer.set(None)
            elif output(self._r.channels[0], at_ns + 1):  # + 1: stock rounds down
                self._timer.set(at_ns)
            else:  # where stock would end a pulse
                self._schedule(at_ns)


def _period_ns(channel: Channel) -> int:
    return channel.count * NS_PER_S // PIT_HZ


def _set(channel: Channel, values: Mapping[str, Any]) -> None:
    for name in NAMES:
        setattr(channel, name, values[name])


def _get(channel: Channel) -> Values:
    return {name: int(getattr(channel, name)) for name in NAMES}


_LIMITS = {
    "count": 0x10000, "count_latched": 4, "read_state": 4, "write_state": 4, "rw_mode": 3, "mode": 5,
    "gate": 1,
}  # fmt: skip


def _check(number: int, values: Mapping[str, Any]) -> None:
    for name, limit in _LIMITS.items():
        value = values[name]
        if not int(name == "count") <= value <= limit:
            raise VMStateError(
                "Impossible counter",
                f"i8254.channels[{number}].{name}",
                expected=f"at most {limit}",
                got=value,
            )
