"""The 8254 timer: channel 0 makes interrupt 0, channel 2 is gated by port 0x61, as on a PC.

    clock input 1,193,182 Hz -> counter -> output
    mode 0, 1, 4, 5: once      2: a pulse each `count`      3: a square wave of period `count`

A counter is no loop: what it shows follows from when it was loaded and the guest's time now. An output that
is high for one clock tick only (modes 2, 4, 5) raises the line and takes it back at once: the interrupt
controller's input is edge triggered.

Source: Intel 8254 data sheet; section `i8254` version 3 and what the data sheet leaves open as in QEMU 7.2
(hw/timer/i8254.c, i8254_common.c).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmm.devices.bus import PortBus
from vmm.errors import VMStateError
from vmm.timers import Timers
from vmm.vmstate import Description, Field, Values

__all__ = ["PIT_DESCRIPTION", "PIT_HZ", "Pit"]

PIT_HZ = 1193182
NS_PER_S = 1_000_000_000
FIRST_PORT = 0x40
SPEAKER_PORT = 0x61
COMMAND = 3
NEVER = -1

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
    """One counter, by the names of its section; times in ns of guest time."""

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

    def ticks(self, now_ns: int) -> int:
        """Clock ticks since the count was loaded."""
        return max(now_ns - self.count_load_time, 0) * PIT_HZ // NS_PER_S

    def counter(self, now_ns: int) -> int:
        """What a read of the counter shows."""
        ticks = self.ticks(now_ns)
        if self.mode in (0, 1, 4, 5):
            return (self.count - ticks) & 0xFFFF
        if self.mode == 3:
            return (self.count - 2 * ticks % self.count) & 0xFFFF
        return (self.count - ticks % self.count) & 0xFFFF

    def output(self, now_ns: int) -> bool:
        """The output's level."""
        ticks = self.ticks(now_ns)
        if self.mode == 0:
            return ticks >= self.count
        if self.mode == 1:
            return ticks < self.count
        if self.mode == 2:
            return ticks % self.count == 0 and ticks != 0
        if self.mode == 3:
            return ticks % self.count < (self.count + 1) // 2
        return ticks == self.count

    def next_rise(self, now_ns: int) -> int:
        """When the output rises next, or NEVER."""
        ticks = self.ticks(now_ns)
        if self.mode in (0, 4, 5):
            target = self.count if ticks < self.count else NEVER
        elif self.mode == 1:
            target = NEVER  # it rises with the gate only
        else:
            target = (ticks // self.count + 1) * self.count
        if target == NEVER:
            return NEVER
        return self.count_load_time - -target * NS_PER_S // PIT_HZ

    def load(self, value: int, now_ns: int) -> None:
        """A new count; 0 is 65536."""
        self.count_load_time = now_ns
        self.count = value or 0x10000


@dataclass
class _Registers:
    channels: list[Channel] = field(default_factory=lambda: [Channel(), Channel(), Channel(gate=0)])
    speaker: int = 0
    refresh: int = 0
    started: bool = False  # an idle guest that never programmed it is not woken up 18 times a second


class Pit:
    """All three channels, and port 0x61."""

    idstr = "i8254"
    instance_id = 0
    description = PIT_DESCRIPTION

    def __init__(
        self, bus: PortBus, timers: Timers, now_ns: Callable[[], int], set_irq: Callable[[bool], None]
    ) -> None:
        """Raises DeviceError if a port is taken."""
        self._now_ns = now_ns
        self._set_irq = set_irq
        self._lock = threading.Lock()  # protects the registers: the vCPU's thread and "timers"
        self._timer = timers.timer(self._fire)
        self._r = _Registers()
        bus.add("i8254", FIRST_PORT, 4, self._read, self._write)
        bus.add("pcspk", SPEAKER_PORT, 1, self._read_speaker, self._write_speaker)

    def reset(self) -> None:
        """As after power-on."""
        with self._lock:
            self._r = _Registers()
            self._timer.set(None)

    # ---- the interrupt; the thread "timers"

    def _fire(self) -> None:
        with self._lock:
            channel = self._r.channels[0]
            self._schedule(channel.next_transition_time)
            self._set_irq(True)
            if channel.mode in (2, 4, 5):
                self._set_irq(False)

    def _schedule(self, after_ns: int) -> None:
        """The next interrupt later than `after_ns`; those that nobody could take are left out."""
        channel = self._r.channels[0]
        at_ns = channel.next_rise(max(after_ns, self._now_ns()))
        channel.next_transition_time = at_ns
        self._timer.set(None if at_ns == NEVER else at_ns)

    def _start(self, channel: Channel, count: int) -> None:
        now_ns = self._now_ns()
        channel.load(count, now_ns)
        if channel is self._r.channels[0]:
            self._r.started = True
            self._set_irq(channel.output(now_ns) and channel.mode not in (2, 4, 5))
            self._schedule(now_ns)

    # ---- ports; the vCPU's thread

    def _write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == COMMAND:
                self._command(value)
                return
            channel = self._r.channels[offset]
            match channel.write_state or channel.rw_mode:
                case 0 | 1:
                    self._start(channel, value)
                case 2:
                    self._start(channel, value << 8)
                case 3:
                    channel.write_latch = value
                    channel.write_state = WORD_HIGH
                case _:
                    channel.write_state = WORD_LOW
                    self._start(channel, channel.write_latch | value << 8)

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
        for number, channel in enumerate(self._r.channels):
            if not value & 2 << number:
                continue
            if not value & 0x20:
                self._latch(channel)
            if not value & 0x10 and not channel.status_latched:
                high = channel.output(self._now_ns())
                channel.status = high << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd
                channel.status_latched = 1

    def _latch(self, channel: Channel) -> None:
        if not channel.count_latched:
            channel.latched_count = channel.counter(self._now_ns())
            channel.count_latched = channel.rw_mode

    def _read(self, offset: int) -> int:
        with self._lock:
            if offset == COMMAND:
                return 0
            return self._read_channel(self._r.channels[offset])

    def _read_channel(self, channel: Channel) -> int:
        if channel.status_latched:
            channel.status_latched = 0
            return channel.status
        if channel.count_latched:
            if channel.count_latched == WORD_LOW:
                channel.count_latched = WORD_HIGH
                return channel.latched_count & 0xFF
            part = (
                channel.latched_count & 0xFF if channel.count_latched == LOW else channel.latched_count >> 8
            )
            channel.count_latched = 0
            return part
        count = channel.counter(self._now_ns())
        if channel.read_state == WORD_LOW:
            channel.read_state = WORD_HIGH
            return count & 0xFF
        if channel.read_state == WORD_HIGH:
            channel.read_state = WORD_LOW
            return count >> 8
        return count >> 8 if channel.read_state == HIGH else count & 0xFF

    def _read_speaker(self, offset: int) -> int:
        with self._lock:
            channel = self._r.channels[2]
            self._r.refresh ^= REFRESH
            out = OUT2 if channel.output(self._now_ns()) else 0
            return channel.gate | self._r.speaker | self._r.refresh | out

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
        return self._r.started

    def save(self) -> Values:
        with self._lock:
            channels = [dict(vars(channel)) for channel in self._r.channels]
        return {
            "channels[0].irq_disabled": 0,
            "channels": channels,
            "channels[0].next_transition_time": channels[0]["next_transition_time"],
        }

    def load(self, values: Values, version: int) -> None:
        """Raises VMStateError for a state that no 8254 can be in."""
        channels = [_checked(number, values["channels"][number]) for number in range(3)]
        with self._lock:
            self._r = _Registers(channels=channels, started=True)
            at_ns = values["channels[0].next_transition_time"]
            channels[0].next_transition_time = at_ns
            self._timer.set(None if at_ns == NEVER or values["channels[0].irq_disabled"] else at_ns)


_LIMITS = {
    "count": 0x10000, "count_latched": 4, "read_state": 4, "write_state": 4, "rw_mode": 3, "mode": 5,
    "gate": 1,
}  # fmt: skip


def _checked(number: int, values: dict[str, Any]) -> Channel:
    channel = Channel(**values)
    for name, limit in _LIMITS.items():
        value = getattr(channel, name)
        if not int(name == "count") <= value <= limit:
            raise VMStateError(
                "Impossible counter",
                f"i8254.channels[{number}].{name}",
                expected=f"at most {limit}",
                got=value,
            )
    return channel
