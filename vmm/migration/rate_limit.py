"""Bytes a second as a budget for each window of 100 ms, as QEMU's rate limit works. ~

Computes only: the clock comes in as numbers. Source: QEMU 7.2 migration/qemu-file.c (qemu_file_rate_limit),
migration.c (BUFFER_DELAY, migration_update_counters).
"""

from __future__ import annotations

__all__ = ["WINDOW_S", "RateLimit"]

WINDOW_S = 0.1


class RateLimit:
    """How much may be sent now, and how long to wait when that is nothing."""

    def __init__(self, now_s: float) -> None:
        self._window_start_s = now_s
        self._spent_bytes = 0

    def budget_bytes(self, now_s: float, limit_bytes_per_s: int) -> int | None:
        """What may still be sent in this window; None = without limit (a limit of 0)."""
        if now_s - self._window_start_s >= WINDOW_S:
            self._window_start_s = now_s
            self._spent_bytes = 0
        if limit_bytes_per_s == 0:
            return None
        return max(0, int(limit_bytes_per_s * WINDOW_S) - self._spent_bytes)

    def spend(self, sent_bytes: int) -> None:
        """Count what was sent."""
        self._spent_bytes += sent_bytes

    def wait_s(self, now_s: float) -> float:
        """How long the window still lasts."""
        return max(0.0, self._window_start_s + WINDOW_S - now_s)
