"""The MC146818 clock and its 128 bytes of CMOS memory, ports 0x70 and 0x71.

    guest's wall clock = base_rtc + (host's wall clock - last_update) + offset

It goes on while the guest is stopped, as a battery-backed clock does. Interrupt 8 comes at the periodic rate,
at each second (update ended) and at the alarm, as register B allows; the guest sees why in register C.

Source: Motorola MC146818A data sheet; section `mc146818rtc` version 3 as in QEMU 7.2 (hw/rtc/mc146818rtc.c).
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

from vmm.devices.bus import PortBus
from vmm.timers import Timers
from vmm.vmstate import Description, Field, Values

__all__ = ["RTC_DESCRIPTION", "Rtc"]

NS_PER_S = 1_000_000_000
FIRST_PORT = 0x70
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D, CENTURY = 10, 11, 12, 13, 0x32
A_UIP, A_RATE = 0x80, 0x0F
B_SET, B_PIE, B_AIE, B_UIE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
D_VALID = 0x80
PM = 0x80
UIP_NS = 244_000
CLOCK_HZ = 32768
ANY = 0xC0
"""In an alarm register: whatever the time."""
SECONDS_PER_DAY = 86400
CLOCK_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

RTC_DESCRIPTION = Description(
    "mc146818rtc",
    3,
    1,
    (
        Field("cmos_data", "buffer", 128),
        Field("cmos_index", "uint8"),
        Field("unused[0]", "unused", 28),
        Field("periodic_timer", "timer"),
        Field("next_periodic_time", "int64"),
        Field("unused[1]", "unused", 24),
        *(Field(name, "uint32", since=2) for name in ("irq_coalesced", "period")),
        *(Field(name, "uint64", since=3) for name in ("base_rtc", "last_update")),
        Field("offset", "int64", since=3),
        Field("update_timer", "timer", since=3),
        Field("next_alarm_time", "uint64", since=3),
    ),
)


def _host_ns() -> int:
    return time.time_ns()


class Rtc:
    """The clock. `set_irq` gets the level of interrupt line 8."""

    idstr = "mc146818rtc"
    instance_id = 0
    description = RTC_DESCRIPTION

    def __init__(
        self,
        bus: PortBus,
        timers: Timers,
        now_ns: Callable[[], int],
        set_irq: Callable[[bool], None],
        host_ns: Callable[[], int] = _host_ns,
    ) -> None:
        """`now_ns` is guest time, `host_ns` the host's wall clock. Raises DeviceError if a port is taken."""
        self._now_ns = now_ns
        self._host_ns = host_ns
        self._set_irq = set_irq
        self._lock = threading.Lock()  # protects the rest: the vCPU's thread and "timers"
        self._periodic = timers.timer(self._periodic_over)
        self._second = timers.timer(self._second_over)
        self._cmos = bytearray(128)
        self._index = 0
        self._offset_ns = 0
        """Guest's wall clock minus the host's."""
        self._seen_second, self._seen_ns = self._wall_ns() // NS_PER_S, now_ns()
        """When the guest has last looked at register C."""
        self._armed_period_ns = self._period_began_ns = 0
        self._used = False
        self._clear()
        bus.add("mc146818rtc", FIRST_PORT, 2, self._read, self._write)

    def _clear(self) -> None:
        self._cmos[REG_A], self._cmos[REG_B] = 0x26, B_24H
        self._cmos[REG_C], self._cmos[REG_D] = 0, D_VALID

    def reset(self) -> None:
        """Interrupts off; the time and the memory stay, as with a battery."""
        with self._lock:
            self._index = 0
            self._cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE)
            self._cmos[REG_C] = 0
            self._arm()
            self._set_irq(False)

    # ---- ports; the vCPU's thread

    def _write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
                return
            self._used = True
            self._write_register(self._index, value)

    def _write_register(self, index: int, value: int) -> None:
        if index == REG_A:
            self._cmos[REG_A] = value & ~A_UIP
            self._arm()
        elif index == REG_B:
            if value & B_SET and not self._cmos[REG_B] & B_SET:
                self._store_time()
                value &= ~B_UIE
            elif self._cmos[REG_B] & B_SET and not value & B_SET:
                self._cmos[REG_B] = value
                self._take_time()
            self._cmos[REG_B] = value
            self._arm()
        elif index in CLOCK_REGISTERS:
            if not self._is_set():
                self._store_time()
            self._cmos[index] = value
            if not self._is_set():
                self._take_time()
        elif index not in (REG_C, REG_D):
            self._cmos[index] = value
            self._arm()

    def _read(self, offset: int) -> int:
        if offset == 0:
            return 0xFF
        with self._lock:
            index = self._index
            if index in CLOCK_REGISTERS and not self._is_set():
                self._store_time()
            elif index == REG_A:
                return self._cmos[REG_A] | (A_UIP if self._is_updating() else 0)
            elif index == REG_C:
                self._note_what_is_over()
                value, self._cmos[REG_C] = self._cmos[REG_C], 0
                self._set_irq(False)
                return value
            return self._cmos[index]

    # ---- time

    def _is_set(self) -> bool:
        return bool(self._cmos[REG_B] & B_SET)

    def _wall_ns(self) -> int:
        return self._host_ns() + self._offset_ns

    def _is_updating(self) -> bool:
        return not self._is_set() and self._wall_ns() % NS_PER_S >= NS_PER_S - UIP_NS

    def _store_time(self) -> None:
        """The time now into the registers, in the form that register B asks for."""
        now = datetime.datetime.fromtimestamp(self._wall_ns() // NS_PER_S, datetime.UTC)
        values = {
            SECONDS: now.second, MINUTES: now.minute, WEEKDAY: now.isoweekday() % 7 + 1,
            DAY: now.day, MONTH: now.month, YEAR: now.year % 100, CENTURY: now.year // 100,
        }  # fmt: skip
        for index, value in values.items():
            self._cmos[index] = self._encode(value)
        if self._cmos[REG_B] & B_24H:
            self._cmos[HOURS] = self._encode(now.hour)
        else:
            self._cmos[HOURS] = self._encode(now.hour % 12 or 12) | (PM if now.hour >= 12 else 0)

    def _take_time(self) -> None:
        """The registers are the time now. What is no time at all changes nothing."""
        year = self._decode(self._cmos[CENTURY]) * 100 + self._decode(self._cmos[YEAR])
        month, day, minute, second = (
            self._decode(self._cmos[index]) for index in (MONTH, DAY, MINUTES, SECONDS)
        )
        hour = self._hour(self._cmos[HOURS])
        try:
            then = datetime.datetime(year, month, day, hour, minute, second, tzinfo=datetime.UTC)
        except ValueError:
            return
        self._offset_ns = int(then.timestamp()) * NS_PER_S - self._host_ns()

    def _hour(self, value: int) -> int:
        if self._cmos[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _encode(self, value: int) -> int:
        return value if self._cmos[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._cmos[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    # ---- interrupts

    def _period_ns(self) -> int:
        rate = self._cmos[REG_A] & A_RATE
        if not rate:
            return 0
        return (1 << (rate + 7 if rate <= 2 else rate) - 1) * NS_PER_S // CLOCK_HZ

    def _arm(self) -> None:
        enabled, now_ns = self._cmos[REG_B], self._now_ns()
        period_ns = self._period_ns()
        if not (enabled & B_PIE and period_ns):
            self._periodic.set(None)
        elif self._periodic.at_ns is None or self._armed_period_ns != period_ns:
            self._periodic.set(now_ns + period_ns)
            self._period_began_ns = now_ns
        self._armed_period_ns = period_ns
        ticking = enabled & (B_UIE | B_AIE) and not enabled & B_SET
        self._second.set(now_ns + NS_PER_S - self._wall_ns() % NS_PER_S if ticking else None)

    def _periodic_over(self) -> None:
        with self._lock:
            period_ns, now_ns = self._period_ns(), self._now_ns()
            if period_ns and self._cmos[REG_B] & B_PIE:
                # Of those that are over only one comes: the guest has to read register C in between.
                self._periodic.set(now_ns + period_ns - (now_ns - self._period_began_ns) % period_ns)
                self._raise(C_PF)

    def _note_what_is_over(self) -> None:
        """The flags of a guest that polls register C, with the interrupts off."""
        now_ns, second = self._now_ns(), self._wall_ns() // NS_PER_S
        period_ns = self._period_ns()
        if second != self._seen_second and not self._is_set():
            self._cmos[REG_C] |= C_UF
        if period_ns and now_ns // period_ns != self._seen_ns // period_ns:
            self._cmos[REG_C] |= C_PF
        self._seen_second, self._seen_ns = second, now_ns

    def _second_over(self) -> None:
        with self._lock:
            self._seen_second = self._wall_ns() // NS_PER_S
            self._second.set(self._now_ns() + NS_PER_S - self._wall_ns() % NS_PER_S)
            self._raise(C_UF | (C_AF if self._is_alarm() else 0))

    def _is_alarm(self) -> bool:
        self._store_time()
        pairs = ((SECONDS, SECONDS_ALARM), (MINUTES, MINUTES_ALARM), (HOURS, HOURS_ALARM))
        return all(
            self._cmos[alarm] & ANY == ANY or self._cmos[alarm] == self._cmos[now] for now, alarm in pairs
        )

    def _raise(self, flags: int) -> None:
        self._cmos[REG_C] |= flags
        if self._cmos[REG_B] & flags & (C_PF | C_AF | C_UF):
            self._cmos[REG_C] |= C_IRQF
            self._set_irq(True)

    # ---- what travels

    @property
    def is_used(self) -> bool:
        """Has the guest written to it? (Reading the time leaves nothing behind.)"""
        return self._used

    def save(self) -> Values:
        with self._lock:
            if not self._is_set():
                self._store_time()
            host_ns = self._host_ns()
            wall_ns = host_ns + self._offset_ns
            periodic, second = (self._on_the_host(each.at_ns) for each in (self._periodic, self._second))
            return {
                "cmos_data": bytes(self._cmos),
                "cmos_index": self._index,
                "periodic_timer": periodic,
                "next_periodic_time": max(periodic, 0),
                "irq_coalesced": 0,
                "period": 0,
                "base_rtc": wall_ns // NS_PER_S,
                "last_update": host_ns,
                "offset": wall_ns % NS_PER_S,
                "update_timer": second,
                "next_alarm_time": self._next_alarm_ns() - self._offset_ns,
            }

    def _on_the_host(self, at_ns: int | None) -> int:
        """An instant of guest time on the host's wall clock, by which stock keeps this device's timers."""
        return -1 if at_ns is None else self._host_ns() + at_ns - self._now_ns()

    def _next_alarm_ns(self) -> int:
        """When the alarm comes next, on the guest's wall clock: within a day, whatever its registers say."""
        wanted = [self._cmos[index] for index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)]
        any_second, any_minute, any_hour = (value & ANY == ANY for value in wanted)
        now_s = self._wall_ns() // NS_PER_S
        second, minute, hour = self._decode(wanted[0]), self._decode(wanted[1]), self._hour(wanted[2])
        at_s = now_s + 1
        while at_s < now_s + SECONDS_PER_DAY:
            if not any_hour and at_s // 3600 % 24 != hour:
                at_s += 3600 - at_s % 3600
            elif not any_minute and at_s // 60 % 60 != minute:
                at_s += 60 - at_s % 60
            elif not any_second and at_s % 60 != second:
                at_s += 1
            else:
                break
        return min(at_s, now_s + SECONDS_PER_DAY) * NS_PER_S

    def load(self, values: Values, version: int) -> None:
        with self._lock:
            self._used = True
            self._cmos[:] = values["cmos_data"]
            self._index = values["cmos_index"] & 0x7F
            if version >= 3:
                wall_ns = values["base_rtc"] * NS_PER_S + values["offset"] - values["last_update"]
                self._offset_ns = wall_ns
            self._arm()
            self._set_irq(bool(self._cmos[REG_C] & C_IRQF))
