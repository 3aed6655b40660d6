"""The statistics, on a clock that only moves when it is told to."""

from __future__ import annotations

import threading

import pytest

from vmm.migration.converge import Outlook
from vmm.migration.stats import FaultLatencies, MigrationStats, Phase, latency_bucket
from vmm.migration.status import MigrationStatus as Status

MS = 1_000_000
RAM_MEMBERS = """
transferred remaining total duplicate skipped normal normal-bytes dirty-pages-rate mbps dirty-sync-count
postcopy-requests page-size multifd-bytes pages-per-second precopy-bytes downtime-bytes postcopy-bytes
dirty-sync-missed-zero-copy
"""


class Clock:
    def __init__(self) -> None:
        self.now_ns = 10**15

    def __call__(self) -> int:
        return self.now_ns

    def pass_ms(self, milliseconds: int) -> None:
        self.now_ns += milliseconds * MS


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats(clock: Clock) -> MigrationStats:
    return MigrationStats(clock, total_bytes=1 << 20, downtime_limit_ms=300)


def test_the_ram_object_has_the_18_mandatory_members(stats: MigrationStats) -> None:
    ram = stats.snapshot().ram()
    assert sorted(ram) == sorted(RAM_MEMBERS.split())
    assert ram["total"] == ram["remaining"] == 1 << 20
    assert ram["page-size"] == 4096


def test_bytes_go_to_the_phase_in_which_they_are_sent(stats: MigrationStats, clock: Clock) -> None:
    clock.pass_ms(5)
    stats.setup_done()
    stats.add_bytes(100)
    clock.pass_ms(20)
    stats.guest_stopped()
    stats.add_bytes(10)
    clock.pass_ms(7)
    stats.switched_over()
    stats.add_bytes(1)
    clock.pass_ms(1000)
    stats.finished()
    clock.pass_ms(1000)
    now = stats.snapshot()
    ram = now.ram()
    assert (ram["precopy-bytes"], ram["downtime-bytes"], ram["postcopy-bytes"]) == (100, 10, 1)
    assert ram["transferred"] == now.transferred_bytes == 111
    assert (now.setup_time_ms, now.downtime_ms, now.total_time_ms) == (5, 7, 1032)
    assert stats.elapsed_ms == 1032


def test_precopys_downtime_lasts_until_the_end_and_may_be_none(stats: MigrationStats, clock: Clock) -> None:
    stats.setup_done()
    stats.guest_stopped()
    stats.finished()
    clock.pass_ms(50)
    assert stats.snapshot().downtime_ms == 0


def test_a_guest_that_runs_on_had_no_downtime(stats: MigrationStats, clock: Clock) -> None:
    stats.guest_stopped()
    clock.pass_ms(50)
    assert stats.snapshot().downtime_ms == 50
    stats.guest_resumed()
    stats.add_bytes(4)
    assert stats.snapshot().downtime_ms == 0
    assert stats.snapshot().bytes_by_phase[Phase.PRECOPY] == 4


def test_rates_are_measured_over_100_ms(stats: MigrationStats, clock: Clock) -> None:
    clock.pass_ms(500)
    stats.setup_done()
    stats.add_bytes(1_000_000)
    stats.add(normal_pages=200, zero_pages=50)
    clock.pass_ms(99)
    assert not stats.tick()
    assert stats.snapshot().bandwidth_bytes_per_s == 0
    clock.pass_ms(1)
    assert stats.tick()
    now = stats.snapshot()
    assert now.bandwidth_bytes_per_s == 10_000_000
    assert (now.mbps, now.pages_per_s) == (80.0, 2500)
    clock.pass_ms(100)
    assert stats.tick()
    assert stats.snapshot().bandwidth_bytes_per_s == 0
    clock.pass_ms(300)
    stats.finished()
    assert stats.snapshot().ram()["mbps"] == 16.0
    assert stats.snapshot().ram()["pages-per-second"] == 500


def test_a_migration_that_took_no_time_has_no_rate(stats: MigrationStats) -> None:
    stats.finished()
    assert stats.snapshot().mbps == 0


def test_syncs_give_the_dirty_rate(stats: MigrationStats, clock: Clock) -> None:
    assert stats.synced(256, 1 << 20) == 1
    assert stats.snapshot().dirty_pages_rate_per_s == 0
    clock.pass_ms(200)
    assert stats.synced(50, 4096 * 50) == 2
    now = stats.snapshot()
    assert (now.dirty_pages_rate_per_s, now.dirty_rate_bytes_per_s) == (250, 250 * 4096)
    assert (now.dirty_sync_count, now.remaining_bytes) == (2, 4096 * 50)
    # Two syncs in the same nanosecond.
    assert stats.synced(1, 0) == 3


def test_counters(stats: MigrationStats) -> None:
    stats.add(normal_pages=2, resent_pages=1)
    stats.set(normal_pages=7, zero_pages=3, requested_pages=4, pushed_pages=5, postcopy_requests=6)
    stats.add(normal_pages=1, discarded_pages=8, stale_pages=9)
    stats.set_remaining(12)
    stats.set_outlook(Outlook("unknown", "", 0, 0, 0, 13))
    now = stats.snapshot()
    ram = now.ram()
    assert (ram["normal"], ram["normal-bytes"], ram["duplicate"]) == (8, 8 * 4096, 3)
    assert (ram["postcopy-requests"], ram["remaining"], now.expected_downtime_ms) == (6, 12, 13)
    assert now.postcopy() == {
        "requested-pages": 4,
        "pushed-pages": 5,
        "resent-pages": 1,
        "discarded-pages": 8,
        "stale-pages": 9,
    }
    for name in ("nope", "mbps", "total_time_ms"):
        with pytest.raises(KeyError, match=name):
            stats.add(**{name: 1})
        with pytest.raises(KeyError, match=name):
            stats.set(**{name: 1})


def test_query_migrate(stats: MigrationStats, clock: Clock) -> None:
    clock.pass_ms(3)
    stats.setup_done()
    stats.synced(256, 1 << 20)
    clock.pass_ms(4)
    stats.synced(9, 4096)
    now = stats.snapshot()
    assert now.query(Status.NONE) == {}
    for status in (Status.SETUP, Status.FAILED, Status.CANCELLED):
        assert now.query(status) == {"status": status.value}
    for status in (Status.ACTIVE, Status.POSTCOPY_ACTIVE, Status.DEVICE, Status.CANCELLING):
        shown = now.query(status)
        assert set(shown) == {"status", "setup-time", "total-time", "expected-downtime", "ram"}
        assert (shown["setup-time"], shown["total-time"], shown["expected-downtime"]) == (3, 7, 300)
        assert (shown["ram"]["remaining"], shown["ram"]["dirty-pages-rate"]) == (4096, 2250)
    shown = now.query(Status.COMPLETED)
    assert set(shown) == {"status", "setup-time", "total-time", "downtime", "ram"}
    assert (shown["ram"]["remaining"], shown["ram"]["dirty-pages-rate"]) == (0, 0)


def test_two_threads_count_and_nothing_is_lost(stats: MigrationStats) -> None:
    def count() -> None:
        for _ in range(2000):
            stats.add(normal_pages=1)
            stats.add_bytes(3)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    now = stats.snapshot()
    assert (now.normal_pages, now.transferred_bytes) == (4000, 12000)


@pytest.mark.parametrize(
    ("microseconds", "bucket"),
    [
        (0, 0),
        (0.9, 0),
        (1, 0),
        (1.9, 0),
        (2, 1),
        (3.9, 1),
        (4, 2),
        (1023, 9),
        (1024, 10),
        (1e7, 23),
        (1e12, 23),
    ],
)
def test_latency_buckets(microseconds: float, bucket: int) -> None:
    assert latency_bucket(int(microseconds * 1000)) == bucket


def test_fault_latencies() -> None:
    samples = [1000 * n for n in range(200, 0, -1)]
    latencies = FaultLatencies.of(samples)
    assert (latencies.count, latencies.sum_ns, latencies.maximum_ns) == (200, 20_100_000, 200_000)
    assert (latencies.median_ns, latencies.p99_ns) == (100_000, 198_000)
    assert len(latencies.buckets) == 24
    assert latencies.buckets[:8] == (1, 2, 4, 8, 16, 32, 64, 73)
    shown = latencies.query()
    assert (shown["count"], shown["median"], shown["p99"], shown["maximum"]) == (
        200,
        100_000,
        198_000,
        200_000,
    )
    assert shown["sum"] == 20_100_000
    assert sum(shown["distribution"]) == 200


def test_no_faults() -> None:
    latencies = FaultLatencies.of([])
    assert (latencies.count, latencies.median_ns, latencies.p99_ns, latencies.maximum_ns) == (0, 0, 0, 0)
    assert FaultLatencies.of([5]).p99_ns == 5
