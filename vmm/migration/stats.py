"""The counters of one outgoing migration, and the immutable snapshot of them that query-migrate shows.

    begin      setup_done         guest_stopped    switched_over      finished
      |--- setup ---|--- precopy ---|-- downtime --|-- (postcopy) --|
      |------------------------- total time ------------------------|

Rules
1. Bytes belong to the phase in which they are sent: precopy, downtime, postcopy. `transferred` is their sum.
2. Rates are measured over windows of at least 100 ms, as in QEMU: bytes, pages and the bandwidth that
   converge.py reckons with. At the end they are averages over the whole transfer.
3. The downtime is measured from the guest's stop at switchover to the end (precopy) or to the package's last
   byte (postcopy), and is 0 ms if it took no time. (7.2 shows a clock reading then.)
4. One lock; a snapshot is consistent in itself.

Source: QEMU 7.2 qapi/migration.json (MigrationStats), migration/migration.c (migration_update_counters,
migration_calculate_complete, fill_source_migration_info).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from vmm.migration import wire
from vmm.migration.converge import Outlook
from vmm.migration.status import MigrationStatus
from vmm.migration.xbzrle import XbzrleStats

__all__ = ["FaultLatencies", "MigrationStats", "Phase", "Snapshot", "latency_bucket"]

WINDOW_NS: Final = 100_000_000
"""QEMU's BUFFER_DELAY: rates are measured over this much time at least."""
EARLY_NS: Final = 5_000_000
"""Sooner an average says nothing; arbitrary. QEMU waits for the first window and syncs over and over."""
LATENCY_BUCKETS: Final = 24


class Phase(Enum):
    """Which counter the bytes on the wire go to."""

    PRECOPY = "precopy-bytes"
    DOWNTIME = "downtime-bytes"
    POSTCOPY = "postcopy-bytes"


@dataclass(frozen=True)
class Snapshot:
    """The counters at one moment."""

    total_bytes: int = 0
    """All RAM."""
    remaining_bytes: int = 0
    bytes_by_phase: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    normal_pages: int = 0
    zero_pages: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate_per_s: int = 0
    pages_per_s: int = 0
    mbps: float = 0.0
    """Megabits per second."""
    bandwidth_bytes_per_s: float = 0.0
    """Of the last window, 0 until there is one."""
    multifd_bytes: int = 0
    """Of the bytes above, those that went over multifd channels."""
    postcopy_requests: int = 0
    """REQ_PAGES messages taken."""
    requested_pages: int = 0
    """Sent because the destination asked."""
    pushed_pages: int = 0
    """Sent by the linear scan in postcopy."""
    resent_pages: int = 0
    """Sent although they had been sent before."""
    discarded_pages: int = 0
    """Discarded at the destination when postcopy started."""
    stale_pages: int = 0
    """The sent map masked with the dirty bitmap when postcopy started: sent, and out of date."""
    setup_time_ms: int = 0
    total_time_ms: int = 0
    downtime_ms: int = 0
    expected_downtime_ms: int = 0
    throttle_percentage: int = 0
    """How much of the time the vCPU is kept still by auto-converge."""
    xbzrle: XbzrleStats | None = None
    """With the capability."""
    outlook: Outlook | None = None
    """Whether precopy will end."""

    @property
    def transferred_bytes(self) -> int:
        return sum(self.bytes_by_phase.values())

    @property
    def dirty_rate_bytes_per_s(self) -> int:
        return self.dirty_pages_rate_per_s * wire.PAGE_SIZE_BYTES

    def ram(self) -> dict[str, int | float]:
        """The `ram` object, with all 18 mandatory members."""
        return {
            "transferred": self.transferred_bytes,
            "remaining": self.remaining_bytes,
            "total": self.total_bytes,
            "duplicate": self.zero_pages,
            "skipped": 0,
            "normal": self.normal_pages,
            "normal-bytes": self.normal_pages * wire.PAGE_SIZE_BYTES,
            "dirty-pages-rate": self.dirty_pages_rate_per_s,
            "mbps": self.mbps,
            "dirty-sync-count": self.dirty_sync_count,
            "postcopy-requests": self.postcopy_requests,
            "page-size": wire.PAGE_SIZE_BYTES,
            "multifd-bytes": self.multifd_bytes,
            "pages-per-second": self.pages_per_s,
            "precopy-bytes": self.bytes_by_phase[Phase.PRECOPY],
            "downtime-bytes": self.bytes_by_phase[Phase.DOWNTIME],
            "postcopy-bytes": self.bytes_by_phase[Phase.POSTCOPY],
            "dirty-sync-missed-zero-copy": 0,
        }

    def postcopy(self) -> dict[str, int]:
        """What postcopy did at the source, beyond what QEMU shows."""
        return {
            "requested-pages": self.requested_pages,
            "pushed-pages": self.pushed_pages,
            "resent-pages": self.resent_pages,
            "discarded-pages": self.discarded_pages,
            "stale-pages": self.stale_pages,
        }

    def query(self, status: MigrationStatus) -> dict[str, Any]:
        """query-migrate's reply for a source in `status`, without error-desc, blockers and extensions."""
        match status:
            case MigrationStatus.NONE:
                return {}
            case MigrationStatus.SETUP | MigrationStatus.FAILED | MigrationStatus.CANCELLED:
                return {"status": status.value}
            case MigrationStatus.COMPLETED:
                downtime = {"downtime": self.downtime_ms}
                ram = replace(self, remaining_bytes=0, dirty_pages_rate_per_s=0).ram()
            case _:
                downtime = {"expected-downtime": self.expected_downtime_ms}
                ram = self.ram()
        times = {"setup-time": self.setup_time_ms, "total-time": self.total_time_ms}
        reply: dict[str, Any] = {"status": status.value, **times, **downtime, "ram": ram}
        if self.xbzrle is not None:
            reply["xbzrle-cache"] = self.xbzrle.query()
        if self.throttle_percentage and status is not MigrationStatus.COMPLETED:
            reply["cpu-throttle-percentage"] = self.throttle_percentage
        if self.outlook is not None and status is MigrationStatus.ACTIVE:
            reply["x-convergence"] = self.outlook.query()
        return reply


_COUNTERS: Final = frozenset(
    {
        "normal_pages",
        "zero_pages",
        "multifd_bytes",
        "postcopy_requests",
        "requested_pages",
        "pushed_pages",
        "resent_pages",
        "discarded_pages",
        "stale_pages",
    }
)


class MigrationStats:
    """Counts one migration at the source. `clock_ns` is monotonic; it is read inside each call.

    The migration thread and the return path thread count, anybody takes snapshots.
    """

    def __init__(self, clock_ns: Callable[[], int], total_bytes: int, downtime_limit_ms: int) -> None:
        self._clock_ns = clock_ns
        self._lock = threading.Lock()  # protects everything below
        self._now = Snapshot(
            total_bytes=total_bytes,
            remaining_bytes=total_bytes,
            # Nothing is measured yet; QEMU shows the limit too.
            expected_downtime_ms=downtime_limit_ms,
        )
        self._phase = Phase.PRECOPY
        self._begin_ns = clock_ns()
        self._setup_done_ns: int | None = None
        self._stopped_ns: int | None = None
        self._switched_ns: int | None = None
        self._finished_ns: int | None = None
        self._last_sync_ns = self._begin_ns
        self._window = (self._begin_ns, 0, 0, 0)  # since when; bytes, pages and content then

    # The course of a migration

    def setup_done(self) -> None:
        """Everything is prepared; pages flow from now on."""
        with self._lock:
            self._setup_done_ns = self._clock_ns()
            self._window = (self._setup_done_ns, self._now.transferred_bytes, self._pages(), self._content())

    def guest_stopped(self) -> None:
        """The guest stands still for switchover: the downtime begins."""
        with self._lock:
            self._stopped_ns = self._clock_ns()
            self._phase = Phase.DOWNTIME

    def guest_resumed(self) -> None:
        """Switchover was given up and the guest runs on here: there was no downtime."""
        with self._lock:
            self._stopped_ns = None
            self._phase = Phase.PRECOPY

    def switched_over(self) -> None:
        """Postcopy's package is out: the downtime ends, what follows is postcopy."""
        with self._lock:
            self._switched_ns = self._clock_ns()
            self._phase = Phase.POSTCOPY

    def finished(self) -> None:
        """The migration has ended, however: times stand still, rates become averages."""
        with self._lock:
            self._finished_ns = now_ns = self._clock_ns()
            since_ns = self._setup_done_ns if self._setup_done_ns is not None else self._begin_ns
            passed_ns = now_ns - since_ns
            self._rates(passed_ns, self._now.transferred_bytes, self._pages(), self._content())

    # Counting

    def add_bytes(self, count: int) -> None:
        """Bytes that went out, of whatever kind, in the phase that is now."""
        with self._lock:
            phases = self._now.bytes_by_phase
            phases = {**phases, self._phase: phases[self._phase] + count}
            self._now = replace(self._now, bytes_by_phase=phases)

    def add(self, **counts: int) -> None:
        """Add to the counters named, as in Snapshot; raises KeyError for what is not a counter."""
        with self._lock:
            self._set({name: getattr(self._now, name, 0) + count for name, count in counts.items()})

    def set(self, **counts: int) -> None:
        """Set the counters named to what somebody else (the page pump) has counted; raises KeyError."""
        with self._lock:
            self._set(counts)

    def _set(self, counts: dict[str, int]) -> None:
        unknown = counts.keys() - _COUNTERS
        if unknown:
            raise KeyError(f"Not a counter: {', '.join(sorted(unknown))}")
        self._now = replace(self._now, **counts)  # type: ignore[arg-type]  # names were just checked

    def set_remaining(self, remaining_bytes: int) -> None:
        """What must still be sent, by the dirty bitmap."""
        with self._lock:
            self._now = replace(self._now, remaining_bytes=remaining_bytes)

    def synced(self, new_dirty_pages: int, remaining_bytes: int) -> int:
        """A bitmap sync has found `new_dirty_pages`; returns the number of syncs so far.

        The first one finds everything dirty and says nothing about the guest, so it gives no rate.
        """
        with self._lock:
            now_ns = self._clock_ns()
            passed_ns = max(now_ns - self._last_sync_ns, 1)
            self._last_sync_ns = now_ns
            is_first = self._now.dirty_sync_count == 0
            rate = 0 if is_first else round(new_dirty_pages * 1e9 / passed_ns)
            self._now = replace(
                self._now,
                dirty_sync_count=self._now.dirty_sync_count + 1,
                dirty_pages_rate_per_s=rate,
                remaining_bytes=remaining_bytes,
            )
            return self._now.dirty_sync_count

    def set_outlook(self, outlook: Outlook) -> None:
        """What converge.py expects."""
        with self._lock:
            expected = outlook.expected_downtime_ms
            self._now = replace(self._now, outlook=outlook, expected_downtime_ms=expected)

    def set_xbzrle(self, xbzrle: XbzrleStats) -> None:
        """How the cache of sent pages does."""
        with self._lock:
            self._now = replace(self._now, xbzrle=xbzrle)

    def set_throttle(self, percentage: int) -> None:
        """What auto-converge does to the vCPU now, 0 = nothing."""
        with self._lock:
            self._now = replace(self._now, throttle_percentage=percentage)

    def tick(self) -> bool:
        """End the window if it is 100 ms old and measure it; True if there are new rates."""
        with self._lock:
            now_ns = self._clock_ns()
            since_ns, bytes_then, pages_then, content_then = self._window
            if now_ns - since_ns < WINDOW_NS:
                return False
            count, pages = self._now.transferred_bytes, self._pages()
            content = self._content()
            self._rates(now_ns - since_ns, count - bytes_then, pages - pages_then, content - content_then)
            self._window = (now_ns, count, pages, content)
            return True

    def _pages(self) -> int:
        return self._now.normal_pages + self._now.zero_pages

    def _content(self) -> int:
        """Bytes of pages that are there now, however few went over a connection that compresses."""
        return self._now.normal_pages * wire.PAGE_SIZE_BYTES

    def _rates(self, passed_ns: int, byte_count: int, page_count: int, content: int) -> None:
        if passed_ns <= 0:
            return
        self._now = replace(
            self._now,
            # What remains is counted in whole pages, so that is what the rate must be of, compressed or not.
            bandwidth_bytes_per_s=max(byte_count, content) * 1e9 / passed_ns,
            mbps=byte_count * 8e3 / passed_ns,
            pages_per_s=round(page_count * 1e9 / passed_ns),
        )

    # Asking

    def bandwidth_bytes_per_s(self, limit_bytes_per_s: int) -> float:
        """What converge.py reckons with: that of the last window; before there is one, the average so far.

        The average may come from a burst at the start of a window, so it is never above the limit (0 = none).
        """
        with self._lock:
            if self._now.bandwidth_bytes_per_s or self._setup_done_ns is None:
                return self._now.bandwidth_bytes_per_s
            passed_ns = self._clock_ns() - self._setup_done_ns
            if passed_ns < EARLY_NS:
                return 0.0
            average = (self._now.transferred_bytes - self._window[1]) * 1e9 / passed_ns
            return min(average, limit_bytes_per_s) if limit_bytes_per_s else average

    @property
    def elapsed_ms(self) -> int:
        """Since the migration began."""
        return self.snapshot().total_time_ms

    def snapshot(self) -> Snapshot:
        """The counters now."""
        with self._lock:
            now_ns = self._finished_ns if self._finished_ns is not None else self._clock_ns()
            setup_end_ns = self._setup_done_ns if self._setup_done_ns is not None else now_ns
            downtime_ns = 0
            if self._stopped_ns is not None:
                end_ns = self._switched_ns if self._switched_ns is not None else now_ns
                downtime_ns = end_ns - self._stopped_ns
            return replace(
                self._now,
                setup_time_ms=_ms(setup_end_ns - self._begin_ns),
                total_time_ms=_ms(now_ns - self._begin_ns),
                downtime_ms=_ms(downtime_ns),
            )


def _ms(nanoseconds: int) -> int:
    return nanoseconds // 1_000_000


def latency_bucket(nanoseconds: int) -> int:
    """Which bucket of the histogram a latency belongs to: N for [2^N us, 2^(N+1) us), both ends open."""
    return min(max((nanoseconds // 1000).bit_length() - 1, 0), LATENCY_BUCKETS - 1)


@dataclass(frozen=True)
class FaultLatencies:
    """How long the destination's guest waited for pages it had to ask for."""

    count: int
    sum_ns: int
    median_ns: int
    p99_ns: int
    maximum_ns: int
    buckets: tuple[int, ...]
    """24 counters; N counts [2^N us, 2^(N+1) us), the last one all that is longer."""

    @classmethod
    def of(cls, samples_ns: Sequence[int]) -> FaultLatencies:
        """From single latencies, in any order."""
        buckets = [0] * LATENCY_BUCKETS
        for sample in samples_ns:
            buckets[latency_bucket(sample)] += 1
        return cls.of_sorted(
            sorted(samples_ns), len(samples_ns), sum(samples_ns), max(samples_ns, default=0), tuple(buckets)
        )

    @classmethod
    def of_sorted(
        cls, samples_ns: Sequence[int], count: int, sum_ns: int, maximum_ns: int, buckets: tuple[int, ...]
    ) -> FaultLatencies:
        """From the last samples, sorted upward, and what was counted over all of them (the page pump)."""
        return cls(count, sum_ns, _quantile(samples_ns, 50), _quantile(samples_ns, 99), maximum_ns, buckets)

    def query(self) -> dict[str, Any]:
        """The members for query-migrate at the destination; latencies in ns."""
        return {
            "count": self.count,
            "sum": self.sum_ns,
            "median": self.median_ns,
            "p99": self.p99_ns,
            "maximum": self.maximum_ns,
            "distribution": list(self.buckets),
        }


def _quantile(samples: Sequence[int], percent: int) -> int:
    """The nearest-rank quantile of sorted samples, 0 if there are none."""
    if not samples:
        return 0
    return samples[max(-(-len(samples) * percent // 100) - 1, 0)]
