"""auto-converge: how much is decided as QEMU does, and the guest's store rate shows that it is done."""

from __future__ import annotations

import functools
import threading
import time

import pytest

from tests.support.real_machines import MIB, Side, Sides, until
from vmm.migration.cpu_throttle import CpuThrottle
from vmm.migration.params import Parameters
from vmm.migration.throttle import ThrottleDecision, next_slice


def decision(**changes: int | bool) -> ThrottleDecision:
    parameters = Parameters()
    parameters.set({name.replace("_", "-"): value for name, value in changes.items()})
    return ThrottleDecision(parameters, 0.0)


def percentages(made: ThrottleDecision, dirtied: int, sent: int, periods: int) -> list[int]:
    """After each period in which so much was dirtied and sent."""
    shown = []
    for period in range(1, periods + 1):
        made.synced(float(period), dirtied, sent * period)
        shown.append(made.percentage)
    return shown


def test_it_takes_two_periods_of_too_much_for_each_step() -> None:
    assert percentages(decision(), 60, 100, 7) == [0, 20, 20, 30, 30, 40, 40]


def test_the_threshold_is_a_part_of_what_was_sent() -> None:
    assert percentages(decision(), 50, 100, 4) == [0, 0, 0, 0]
    assert percentages(decision(throttle_trigger_threshold=49), 50, 100, 4) == [0, 20, 20, 30]


def test_no_further_than_the_maximum() -> None:
    assert percentages(decision(cpu_throttle_initial=90, max_cpu_throttle=95), 9, 1, 6)[1::2] == [90, 95, 95]


def test_tailslow_goes_no_further_than_needed() -> None:
    # 80 % of the time it dirties 60; 50 would be allowed, which is 5/6 of it: 13 % less.
    made = decision(cpu_throttle_increment=50, cpu_throttle_tailslow=True)
    assert percentages(made, 60, 100, 4) == [0, 20, 20, 33]
    assert percentages(decision(cpu_throttle_increment=50), 60, 100, 4) == [0, 20, 20, 70]


def test_syncs_within_a_second_are_added_up() -> None:
    made = decision()
    assert not made.synced(0.5, 30, 40)
    assert not made.synced(1.0, 30, 100)
    assert not made.synced(1.9, 51, 190)
    assert made.synced(2.0, 0, 200)
    assert made.percentage == 20


@pytest.mark.parametrize("percentage", range(1, 100))
def test_slices_are_short_and_of_the_right_share(percentage: int) -> None:
    run_s, still_s = next_slice(percentage)
    assert still_s / (run_s + still_s) == pytest.approx(percentage / 100)
    assert run_s >= 0.0005
    assert run_s + still_s <= (0.0101 if percentage <= 95 else 0.051)


@pytest.fixture
def dirtier(machines: Sides) -> Side:
    """Says 'B' after each 100 rounds over 64 pages."""
    made = machines.make("dirtier", f"start={MIB:#x} end={MIB + 64 * 4096:#x} rounds=100")
    made.wait_output(lambda text: "B" in text)
    return made


def stores_per_s(guest: Side, seconds: float = 0.25) -> float:
    """How fast the guest stores, in hundred rounds a second."""
    since_s, before = time.monotonic(), len(guest.serial.text)
    threading.Event().wait(seconds)  # what is measured
    return (len(guest.serial.text) - before) / (time.monotonic() - since_s)


def test_the_guest_stores_less_by_that_share_and_freely_after_it(dirtier: Side) -> None:
    rates: dict[int, list[float]] = {0: [], 50: [], 90: []}
    for _ in range(3):
        throttle = CpuThrottle(dirtier.machine.vcpu_quiet)
        try:
            for percentage, seen in rates.items():
                if percentage:
                    throttle.set(percentage)
                seen.append(stores_per_s(dirtier, 0.15))
            assert dirtier.machine.run_state.value == "running"
        finally:
            throttle.end()
            throttle.end()
    free, half, tenth = (max(seen) for seen in rates.values())
    assert 0 < tenth < half < free, rates
    assert half < 0.8 * free, rates
    assert tenth < 0.4 * free, rates
    assert dirtier.values("STOP") == []


def _has_said_more(guest: Side, said: str) -> bool:
    return len(guest.serial.text) > len(said)


def test_stop_and_cont_of_users_work_while_it_is_throttled(dirtier: Side) -> None:
    throttle = CpuThrottle(dirtier.machine.vcpu_quiet)
    try:
        throttle.set(60)
        for _ in range(20):
            dirtier.pause()
            said = dirtier.serial.text
            threading.Event().wait(0.005)
            assert dirtier.serial.text == said
            assert dirtier.machine.vcpu.is_paused
            dirtier.machine.cont()
            until(functools.partial(_has_said_more, dirtier, said), "the guest goes on")
    finally:
        throttle.end()


def test_what_ends_the_thread_is_raised_at_the_end() -> None:
    def broken() -> None:
        raise ValueError("no vCPU")

    throttle = CpuThrottle(broken)  # type: ignore[arg-type]  # on purpose
    throttle.set(99)
    until(lambda: throttle.error, "the end of the thread")
    with pytest.raises(ValueError, match="no vCPU"):
        throttle.end()


def test_a_migration_throttles_until_it_is_cancelled(machines: Sides, dirtier: Side) -> None:
    free = stores_per_s(dirtier)
    machines.make(incoming=True).migrator.incoming(machines.uri)
    dirtier.capability("auto-converge")
    dirtier.migrator.set_parameters(
        {"cpu-throttle-initial": 95, "max-bandwidth": MIB // 2, "downtime-limit": 0}
    )
    dirtier.migrator.migrate(machines.uri)
    dirtier.wait("active")
    until(lambda: dirtier.migrator.query().get("cpu-throttle-percentage") == 95, "throttled")
    assert dirtier.migrator.query()["x-convergence"]["verdict"] != "unknown"
    assert stores_per_s(dirtier) < 0.3 * free
    dirtier.migrator.cancel()
    dirtier.wait("cancelled")
    assert "cpu-throttle-percentage" not in dirtier.migrator.query()
    until(lambda: stores_per_s(dirtier, 0.1) > 0.3 * free, "the guest runs freely")


def test_nothing_is_throttled_without_the_capability(machines: Sides, dirtier: Side) -> None:
    machines.make(incoming=True).migrator.incoming(machines.uri)
    dirtier.migrator.set_parameters({"max-bandwidth": MIB // 2, "downtime-limit": 0})
    dirtier.migrator.migrate(machines.uri)
    dirtier.wait("active")
    until(lambda: dirtier.migrator.query()["total-time"] > 2500, "time")
    assert "cpu-throttle-percentage" not in dirtier.migrator.query()
    dirtier.migrator.cancel()
    dirtier.wait("cancelled")
