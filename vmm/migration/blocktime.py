"""~ How long the guest waited for pages, in QEMU's members of query-migrate at the destination.

A wait lasts from the moment the fault is read from the userfaultfd until the page is placed and the thread
awake; it counts once it is over. Per thread that waits: two that wait for one page are two waits.

    postcopy-blocktime          ms in which all vCPUs waited at once; with one vCPU that of the vCPU
    postcopy-vcpu-blocktime     ms for each vCPU, faults that were served without the source included
    postcopy-latency            ns, mean over the faults that the source had to answer (since 10.1, as below)
    postcopy-latency-dist       24 counters; N counts 2^N to 2^(N+1) us, the last also all longer ones
    postcopy-vcpu-latency       ns, mean for each vCPU
    postcopy-non-vcpu-latency   ns, mean of all other threads

Source: QEMU 7.2 qapi/migration.json (MigrationInfo), migration/postcopy-ram.c; newer ones for the latencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Blocktime"]


@dataclass(frozen=True)
class Blocktime:
    """The waits that are over, of a machine with one vCPU."""

    vcpu_blocked_ns: int
    count: int
    """Waits for pages that the source had to send."""
    latency_sum_ns: int
    vcpu_count: int
    """Those of them that the vCPU waited for."""
    vcpu_latency_sum_ns: int
    buckets: tuple[int, ...]

    def query(self) -> dict[str, Any]:
        """The members for query-migrate."""
        blocked_ms = self.vcpu_blocked_ns // 1_000_000
        others_sum_ns = self.latency_sum_ns - self.vcpu_latency_sum_ns
        return {
            "postcopy-blocktime": blocked_ms,
            "postcopy-vcpu-blocktime": [blocked_ms],
            "postcopy-latency": _mean(self.latency_sum_ns, self.count),
            "postcopy-latency-dist": list(self.buckets),
            "postcopy-vcpu-latency": [_mean(self.vcpu_latency_sum_ns, self.vcpu_count)],
            "postcopy-non-vcpu-latency": _mean(others_sum_ns, self.count - self.vcpu_count),
        }


def _mean(total: int, count: int) -> int:
    return total // count if count else 0
