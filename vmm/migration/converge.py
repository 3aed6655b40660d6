"""Whether to go on, to switch over, or to start postcopy: figures in, a verdict out.

    remaining  >= threshold      postcopy wanted  -> start postcopy
                                 out of time      -> give up
                                 else             -> iterate
    remaining  <  threshold      an estimate      -> sync, and ask again with the exact figure
                                 exact            -> switch over

    threshold = measured bandwidth * downtime limit: what can be sent while the guest stands still

As in QEMU, a migration that can switch over within the downtime limit does so even if postcopy was asked
for: nothing is gained by risking the guest on two hosts. With nothing remaining it always can.

The outlook is the same for people: will precopy end by itself, and if not, why.

Source: QEMU 7.2 migration/migration.c (migration_iteration_run, migration_update_counters).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

__all__ = ["Decision", "Figures", "Outlook", "Verdict", "decide", "outlook"]


class Decision(Enum):
    """What the migration thread does next."""

    ITERATE = "iterate"
    SYNC = "sync"
    SWITCH_OVER = "switch over"
    START_POSTCOPY = "start postcopy"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Figures:
    """What is known now. Bandwidth and dirty rate are 0 as long as nothing has been measured."""

    remaining_bytes: int
    remaining_is_exact: bool
    """The bitmap has just been synced; otherwise the guest may have dirtied more since."""
    bandwidth_bytes_per_s: float
    dirty_rate_bytes_per_s: float
    downtime_limit_ms: int
    elapsed_ms: int
    """Since the migration began."""
    postcopy_enabled: bool = False
    """The capability is on, and the channel goes both ways."""
    postcopy_requested: bool = False
    """The user has asked for it."""
    postcopy_start_time_ms: int = 0
    """Postcopy starts by itself after this time, 0 = never."""
    give_up_after_ms: int = 0
    """A migration that has not converged by then has failed, 0 = never."""
    throttle_percentage: int = 0
    """How much of the time the guest is kept still, so that it converges."""


@dataclass(frozen=True)
class Verdict:
    """The decision, the figures it rests on, and why, for the log and the user."""

    decision: Decision
    reason: str
    threshold_bytes: int
    expected_downtime_ms: int


def threshold_bytes(figures: Figures) -> int:
    """What can be sent within the downtime limit."""
    return int(figures.bandwidth_bytes_per_s * figures.downtime_limit_ms / 1000)


def expected_downtime_ms(figures: Figures) -> int:
    """How long the guest would stand still if switchover began now; the limit while nothing is measured."""
    if figures.remaining_bytes == 0:
        return 0
    if figures.bandwidth_bytes_per_s < 1:
        return figures.downtime_limit_ms
    return -int(-figures.remaining_bytes * 1000 // figures.bandwidth_bytes_per_s)


def decide(figures: Figures) -> Verdict:
    """The verdict on `figures`."""
    threshold = threshold_bytes(figures)
    decision, reason = _decide(figures, threshold)
    return Verdict(decision, reason, threshold, expected_downtime_ms(figures))


def _decide(figures: Figures, threshold: int) -> tuple[Decision, str]:
    remaining = figures.remaining_bytes
    if remaining == 0 or remaining < threshold:
        if not figures.remaining_is_exact:
            return Decision.SYNC, "little seems to remain, what has the guest dirtied since?"
        return Decision.SWITCH_OVER, f"{remaining} bytes fit into the downtime limit"
    if figures.postcopy_enabled:
        if figures.postcopy_requested:
            return Decision.START_POSTCOPY, "the user has asked for postcopy"
        if 0 < figures.postcopy_start_time_ms <= figures.elapsed_ms:
            return (
                Decision.START_POSTCOPY,
                f"precopy has not finished in {figures.postcopy_start_time_ms} ms",
            )
    if 0 < figures.give_up_after_ms <= figures.elapsed_ms:
        return Decision.GIVE_UP, f"not converged in {figures.give_up_after_ms} ms: {_why_not(figures)}"
    return Decision.ITERATE, f"{remaining} bytes remain, {threshold} would fit into the downtime limit"


def _why_not(figures: Figures) -> str:
    if figures.dirty_rate_bytes_per_s >= figures.bandwidth_bytes_per_s > 0:
        return "the guest dirties pages faster than they can be sent"
    return "more remains than fits into the downtime limit"


HOPELESS: Final = 0.9
"""Of the bandwidth. A guest that writes to all its working set in each pass is measured at about the
bandwidth, however much faster it is: a page counts once a pass."""


@dataclass(frozen=True)
class Outlook:
    """Whether precopy will end by itself, with the figures that say so."""

    verdict: str
    """`unknown`, `converging` or `not-converging`."""
    reason: str
    bandwidth_bytes_per_s: int
    dirty_rate_bytes_per_s: int
    threshold_bytes: int
    expected_downtime_ms: int

    def query(self) -> dict[str, Any]:
        """The object for query-migrate."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "bandwidth": self.bandwidth_bytes_per_s,
            "dirty-rate": self.dirty_rate_bytes_per_s,
            "threshold": self.threshold_bytes,
        }


def outlook(figures: Figures) -> Outlook:
    """The outlook of a precopy with `figures`."""
    verdict, why = _outlook(figures)
    return Outlook(
        verdict,
        why,
        round(figures.bandwidth_bytes_per_s),
        round(figures.dirty_rate_bytes_per_s),
        threshold_bytes(figures),
        expected_downtime_ms(figures),
    )


def _outlook(figures: Figures) -> tuple[str, str]:
    bandwidth, dirty_rate = figures.bandwidth_bytes_per_s, figures.dirty_rate_bytes_per_s
    if bandwidth < 1:
        return "unknown", "nothing is measured yet"
    rates = f"the guest dirties {_mib(dirty_rate)} MiB/s, {_mib(bandwidth)} MiB/s are sent"
    if figures.throttle_percentage:
        rates += f"; it is throttled by {figures.throttle_percentage} %"
    if figures.remaining_bytes < threshold_bytes(figures):
        return "converging", "what remains fits into the downtime limit"
    if threshold_bytes(figures) == 0 and dirty_rate > 0:
        return (
            "not-converging",
            f"will not converge with this downtime limit, because nothing fits into it: {rates}",
        )
    if dirty_rate >= HOPELESS * bandwidth:
        return (
            "not-converging",
            f"will not converge at this rate, because pages get dirty as fast as they go: {rates}",
        )
    return "converging", rates


def _mib(rate_bytes_per_s: float) -> str:
    return f"{rate_bytes_per_s / (1 << 20):.1f}"
