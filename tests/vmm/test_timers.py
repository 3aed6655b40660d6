"""Timers call back at their instant of guest time, and never while that stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from vmm.clock import VirtualClock
from vmm.timers import Timers

DEADLINE_S = 60.0
MS = 1_000_000


class Bench:
    """Real timers on a real clock."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.timers = Timers(self.clock)
        self.called = threading.Semaphore(0)
        self.at: list[int] = []

    def callback(self) -> None:
        self.at.append(self.clock.now_ns())
        self.called.release()

    def run(self) -> None:
        self.clock.start()
        self.timers.resume()

    def stop(self) -> None:
        self.clock.stop()
        self.timers.pause()

    def wait_called(self) -> None:
        assert self.called.acquire(timeout=DEADLINE_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    assert made.timers.close(DEADLINE_S)


def test_it_calls_at_its_instant_and_once(bench: Bench) -> None:
    timer = bench.timers.timer(bench.callback)
    bench.run()
    timer.set(20 * MS)
    bench.wait_called()
    assert bench.at[0] >= 20 * MS
    assert timer.at_ns is None


def test_what_was_set_before_the_clock_runs_comes_when_it_does(bench: Bench) -> None:
    late, soon = bench.timers.timer(bench.callback), bench.timers.timer(bench.callback)
    late.set(30 * MS)
    soon.set(5 * MS)
    bench.run()
    bench.wait_called()
    bench.wait_called()
    assert bench.at == sorted(bench.at)
    assert bench.at[0] >= 5 * MS
    assert bench.at[1] >= 30 * MS


def test_an_earlier_instant_takes_the_place_of_a_later_one(bench: Bench) -> None:
    timer = bench.timers.timer(bench.callback)
    bench.run()
    timer.set(3600 * 1000 * MS)
    timer.set(10 * MS)
    bench.wait_called()


def test_none_is_no_instant(bench: Bench) -> None:
    timer, other = bench.timers.timer(bench.callback), bench.timers.timer(bench.callback)
    bench.run()
    timer.set(bench.clock.now_ns() + 5 * MS)
    timer.set(None)
    other.set(bench.clock.now_ns() + 20 * MS)
    bench.wait_called()
    assert len(bench.at) == 1


def test_a_callback_may_set_its_own_timer(bench: Bench) -> None:
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        if count < 5:
            timer.set(bench.clock.now_ns())
        else:
            bench.called.release()

    timer = bench.timers.timer(again)
    bench.run()
    timer.set(0)
    bench.wait_called()
    assert count == 5


def test_nothing_is_called_once_pause_has_returned(bench: Bench) -> None:
    entered, leave = threading.Event(), threading.Event()
    ended: list[float] = []

    def slow() -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)
        ended.append(time.monotonic())

    first = bench.timers.timer(slow)
    bench.run()
    first.set(0)
    assert entered.wait(DEADLINE_S)
    threading.Timer(0.02, leave.set).start()
    bench.stop()
    assert ended, "pause has waited for the callback under way"
    second = bench.timers.timer(bench.callback)
    second.set(0)
    assert second.at_ns == 0
    assert bench.at == []
    bench.run()
    bench.wait_called()


def test_a_callback_that_fails_does_not_end_the_others(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    failing, good = bench.timers.timer(fail), bench.timers.timer(bench.callback)
    bench.run()
    failing.set(0)
    good.set(5 * MS)
    bench.wait_called()
    assert "a timer's callback has failed" in caplog.text
