"""The clock shows the host's time in the form the guest asks for, interrupts as it allows, and travels."""

from __future__ import annotations

import datetime

import pytest

from vmm.clock import VirtualClock
from vmm.devices.bus import PortBus
from vmm.devices.rtc import RTC_DESCRIPTION, Rtc
from vmm.timers import Timers
from vmm.vmstate import BytesSource, decode, encode

S = 1_000_000_000
MS = 1_000_000
THEN = datetime.datetime(2026, 11, 23, 15, 4, 5, tzinfo=datetime.UTC)
A, B, C, D, CENTURY = 10, 11, 12, 13, 0x32
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10


class Box:
    """A clock whose time is turned by hand; guest time has begun at 1 s."""

    def __init__(self, then: datetime.datetime = THEN) -> None:
        self.passed_ns = 0
        self._began_ns = int(then.timestamp()) * S
        self.irq = False
        self.bus = PortBus()
        self.rtc = Rtc(self.bus, Timers(VirtualClock()), self.guest_ns, self._set_irq, self.host_ns)
        self._timers = (self.rtc._periodic, self.rtc._second)

    def guest_ns(self) -> int:
        return S + self.passed_ns

    def host_ns(self) -> int:
        return self._began_ns + self.passed_ns

    def _set_irq(self, level: bool) -> None:
        self.irq = level

    def read(self, index: int) -> int:
        self.bus.write(0x70, 1, index)
        return self.bus.read(0x71, 1)

    def write(self, index: int, value: int) -> None:
        self.bus.write(0x70, 1, index)
        self.bus.write(0x71, 1, value)

    def shown(self) -> list[int]:
        return [self.read(index) for index in (CENTURY, 9, 8, 7, 4, 2, 0)]

    def wait(self, ns: int) -> None:
        """Turn the clock, and call the timers that are due on the way."""
        end = self.passed_ns + ns
        while True:
            due = [timer for timer in self._timers if timer.at_ns is not None and timer.at_ns <= S + end]
            if not due:
                break
            first = min(due, key=lambda timer: timer.at_ns or 0)
            assert first.at_ns is not None
            self.passed_ns = max(first.at_ns - S, self.passed_ns)
            first.at_ns = None
            first.callback()
        self.passed_ns = end


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (H24, [0x20, 0x26, 0x11, 0x23, 0x15, 0x04, 0x05]),
        (H24 | BINARY, [20, 26, 11, 23, 15, 4, 5]),
        (0, [0x20, 0x26, 0x11, 0x23, 0x83, 0x04, 0x05]),
        (BINARY, [20, 26, 11, 23, 0x83, 4, 5]),
    ],
)
def test_the_time_in_each_form(mode: int, expected: list[int]) -> None:
    box = Box()
    box.write(B, mode)
    assert box.shown() == expected
    box.wait(2 * S)
    assert box.shown()[-1] == expected[-1] + 2
    assert box.read(6) == 2, "a Monday"


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (11, 0x11), (12, 0x92), (23, 0x91)])
def test_twelve_hours(hour: int, shown: int) -> None:
    box = Box(THEN.replace(hour=hour))
    box.write(B, 0)
    assert box.read(4) == shown


@pytest.mark.parametrize("at_once", [True, False])
def test_the_guest_sets_it(at_once: bool) -> None:
    box = Box()
    if at_once:
        box.write(B, H24 | SET)
    for index, value in ((CENTURY, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)):
        box.write(index, value)
    if at_once:
        box.wait(10 * S)
        assert box.read(0) == 0x58, "it stands still"
        box.write(B, H24)
    box.wait(3 * S)
    assert box.shown() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01]


def test_a_time_that_cannot_be_changes_nothing() -> None:
    box = Box()
    box.write(8, 0x13)
    box.wait(S)
    assert box.read(8) == 0x11


def test_the_update_in_progress_shows_just_before_the_second() -> None:
    box = Box()
    assert not box.read(A) & 0x80
    box.wait(S - 100_000)
    assert box.read(A) & 0x80


def test_the_periodic_interrupt_keeps_its_rate() -> None:
    box = Box()
    box.write(A, 0x26)  # 1024 Hz
    box.write(B, H24 | PIE)
    count = 0
    for _ in range(2000):
        box.wait(100_000)
        if box.irq:
            assert box.read(C) == IRQF | PF
            assert not box.irq
            count += 1
    assert count == pytest.approx(1024 * 0.2, abs=2)


def test_the_interrupt_at_each_second_and_at_the_alarm() -> None:
    box = Box()
    for index, value in ((1, 0x07), (3, 0x04), (5, 0xFF)):  # at xx:04:07
        box.write(index, value)
    box.write(B, H24 | AIE)
    box.wait(S)
    assert not box.irq
    box.wait(S)
    assert box.irq
    assert box.read(C) & ~PF == IRQF | AF | UF
    box.write(B, H24 | UIE)
    box.wait(S)
    assert box.read(C) & ~PF == IRQF | UF
    box.write(B, H24)
    box.wait(5 * S)
    assert not box.irq


def test_a_guest_that_polls_sees_the_flags_without_an_interrupt() -> None:
    box = Box()
    box.write(A, 0x26)
    box.read(C)
    assert box.read(C) == 0
    box.wait(2 * MS)
    assert box.read(C) == PF
    box.wait(S)
    assert box.read(C) == PF | UF
    assert not box.irq


def test_a_reset_keeps_time_and_memory() -> None:
    box = Box()
    box.write(0x40, 0x77)
    box.write(9, 0x30)
    box.write(B, H24 | UIE)
    box.wait(S)
    box.rtc.reset()
    assert not box.irq
    assert [box.read(0x40), box.read(9), box.read(B), box.read(C) & IRQF] == [0x77, 0x30, H24, 0]
    assert box.read(D) == 0x80


def test_it_travels_and_goes_on_with_the_time_that_has_passed() -> None:
    here, there = Box(), Box()
    here.write(9, 0x30)
    here.write(0x40, 0x77)
    here.write(B, H24 | UIE)
    data = encode(RTC_DESCRIPTION, here.rtc.save())
    there.wait(3 * S)
    there.rtc.load(decode(RTC_DESCRIPTION, BytesSource(data), 3), 3)
    here.wait(3 * S)
    assert there.shown() == here.shown()
    assert there.read(0x40) == 0x77
    there.wait(S)
    assert there.irq


def test_a_stock_peer_gets_instants_of_the_hosts_clock() -> None:
    box = Box()
    for index, value in ((1, 0x00), (3, 0x30), (5, 0x03)):
        box.write(index, value)
    box.write(A, 0x2F)  # 2 Hz
    box.write(B, H24 | UIE | PIE)
    box.wait(250 * MS)
    values = box.rtc.save()
    now = box.host_ns()
    assert values["periodic_timer"] == values["next_periodic_time"] == now + 250 * MS
    assert values["update_timer"] == now + 750 * MS
    alarm = datetime.datetime.fromtimestamp(values["next_alarm_time"] // S, datetime.UTC)
    assert alarm == datetime.datetime(2026, 11, 24, 3, 30, 0, tzinfo=datetime.UTC)
    box.write(B, H24)
    values = box.rtc.save()
    assert values["periodic_timer"] == values["update_timer"] == -1


@pytest.mark.parametrize("registers", [(0x61, 0x04, 0x03), (0xFF, 0xFF, 0xFF), (0x05, 0x04, 0x15)])
def test_the_next_alarm_is_within_a_day_whatever_the_registers_say(registers: tuple[int, int, int]) -> None:
    box = Box()
    for index, value in zip((1, 3, 5), registers, strict=True):
        box.write(index, value)
    alarm = box.rtc.save()["next_alarm_time"]
    assert box.host_ns() < alarm <= box.host_ns() + 86401 * S
