"""~ How much a guest that does not converge is throttled: what it dirtied and what was sent in, a share out.

    each sync, once a second at most:
        dirtied > sent * throttle-trigger-threshold   twice running  -> more
    more = cpu-throttle-initial at first, then + cpu-throttle-increment, up to max-cpu-throttle
           cpu-throttle-tailslow: no further than to where dirtied would be that part of sent

The share is the percentage of time for which the vCPU stands still; `cpu_throttle.py` does that.
Source: QEMU 7.2 migration/ram.c (migration_trigger_throttle, mig_throttle_guest_down).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmm.migration.params import Parameters

__all__ = ["RUN_S", "SLICE_S", "ThrottleDecision", "next_slice"]

PERIOD_S: Final = 1.0
"""QEMU's: less says too little about the guest."""
PERIODS: Final = 2
"""So many times running there must have been too much."""

SLICE_S: Final = 0.01
"""The guest runs and stands still once in this time, QEMU's timeslice: smooth for who looks at it."""
RUN_S: Final = 0.0005
"""It runs at least so long; shorter, and starting is most of it. From 95 % on the slices get longer."""


def next_slice(percentage: int) -> tuple[float, float]:
    """For how long to run and then to stand still, in seconds."""
    share = percentage / 100
    run_s = max(SLICE_S * (1 - share), RUN_S)
    return run_s, run_s * share / (1 - share)


class ThrottleDecision:
    """One migration's; `percentage` is 0 until throttling begins."""

    def __init__(self, parameters: Parameters, now_s: float) -> None:
        self._parameters = parameters
        self._since_s = now_s
        self._sent_then = 0
        self._dirtied_bytes = 0
        self._too_much = 0
        self.percentage = 0

    def synced(self, now_s: float, dirtied_bytes: int, sent_bytes: int) -> bool:
        """A sync has found `dirtied_bytes`; `sent_bytes` in all since the start. True: a new percentage."""
        self._dirtied_bytes += dirtied_bytes
        if now_s - self._since_s < PERIOD_S:
            return False
        dirtied = self._dirtied_bytes
        threshold = (sent_bytes - self._sent_then) * self._parameters["throttle-trigger-threshold"] // 100
        self._since_s, self._sent_then, self._dirtied_bytes = now_s, sent_bytes, 0
        # As in QEMU a period without too much does not take back what there was before it.
        if dirtied <= threshold:
            return False
        self._too_much += 1
        if self._too_much < PERIODS:
            return False
        self._too_much = 0
        before = self.percentage
        self.percentage = self._more(dirtied, threshold)
        return self.percentage != before

    def _more(self, dirtied: int, threshold: int) -> int:
        parameters, now = self._parameters, self.percentage
        if not now:
            return int(parameters["cpu-throttle-initial"])
        step = parameters["cpu-throttle-increment"]
        if parameters["cpu-throttle-tailslow"]:
            running = 100 - now
            step = min(step, int(running - running * threshold / dirtied))
        return int(min(now + step, max(parameters["max-cpu-throttle"], 1)))
