"""What is promised of the page path, and whether a run kept it: ratios to stock within each round. ~"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["GOALS", "Goal", "Samples", "Verdict", "judge"]

Samples = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
"""Job -> kind of machine ("pageferry", "stock", "limit") -> the figures of each round."""


@dataclass(frozen=True)
class Goal:
    """`figure` of `job` is at most `most` times the other's, or at least `least` times as fast.

    Without any of the three it is shown, and not judged.
    """

    job: str
    figure: str
    text: str
    most: float | None = None
    least: float | None = None
    against: str = "stock"
    absolute: float | None = None
    """Instead of a ratio: the figure is at most this."""

    @property
    def wanted(self) -> str:
        """For the table."""
        if self.absolute is not None:
            return f"<= {self.absolute:g}"
        if self.most is not None:
            return f"<= {self.most:g}x"
        return f">= {self.least:g}x" if self.least is not None else ""


def _faster(job: str, text: str, least: float, against: str = "stock") -> Goal:
    return Goal(job, "total_ms", text, least=least, against=against)


def _running(job: str, text: str) -> list[Goal]:
    return [
        Goal(job, "total_ms", f"{text}: total time, ms", most=1.0),
        Goal(job, "transferred_mb", f"{text}: sent, MB", most=1.0),
        Goal(job, "downtime_ms", f"{text}: downtime, STOP to RESUME, ms", absolute=300.0),
        Goal(job, "reported_downtime_ms", f"{text}: downtime, as reported, ms"),
    ]


GOALS: tuple[Goal, ...] = (
    _faster("precopy_unix", "precopy 1 GiB of content, unix: ms, times as fast", 1.5),
    _faster("precopy_unix", "  of a C program that does only this", 0.8, "limit"),
    _faster("precopy_tcp", "precopy 1 GiB of content, tcp: ms, times as fast", 1.3),
    _faster("precopy_tcp", "  of a C program that does only this", 0.8, "limit"),
    _faster("zero_pages", "precopy 1 GiB of zero pages: ms, times as fast", 2.0),
    _faster("sparse", "precopy 8 GiB, 100 MiB touched: ms, times as fast", 5.0),
    *_running("precopy_dirtier", "precopy, running dirtier"),
    *_running("precopy_auditor_fast", "precopy, auditor writing 1/4"),
    *_running("precopy_auditor_slow", "precopy, auditor writing 1/64"),
    Goal("postcopy_dirtier", "total_ms", "postcopy, running dirtier: total time, ms", most=0.6),
    Goal(
        "postcopy_dirtier", "after_stop_ms", "postcopy, running dirtier: from STOP to the end, ms", most=0.6
    ),
    Goal(
        "postcopy_dirtier", "downtime_ms", "postcopy, running dirtier: downtime, STOP to RESUME, ms", most=1.0
    ),
    Goal("postcopy_dirtier", "reported_downtime_ms", "postcopy, running dirtier: downtime, as reported, ms"),
    Goal("latency_quiet", "median_us", "page fault, push held back: median, us", most=0.4),
    Goal("latency_quiet", "p99_us", "page fault, push held back: p99, us", most=1.0),
    Goal("latency_pushed", "median_us", "page fault under full push: median, us", most=0.7),
    Goal("latency_pushed", "p99_us", "page fault under full push: p99, us", most=1.0),
    Goal("bitmap_sync", "clean_us", "bitmap sync of 1 GiB, clean: us", most=0.2),
    Goal("bitmap_sync", "dirty_us", "bitmap sync of 1 GiB, all dirty: us", most=0.2),
    *(
        Goal(job, f"{when}_per_s", f"{what}, {text}: 1/s", least=1.0)
        for job, what in (("speed_stores", "stores"), ("speed_ports", "port reads"))
        for when, text in (
            ("idle", "idle"),
            ("dirty_log", "dirty log on"),
            ("after_postcopy", "after postcopy"),
        )
    ),
    Goal("precopy_unix", "source_beyond_ram_mb", "source's peak memory beyond guest RAM, MB", most=0.8),
    Goal("precopy_unix", "target_beyond_ram_mb", "destination's peak memory beyond guest RAM, MB", most=0.8),
)


@dataclass(frozen=True)
class Verdict:
    """One row of the table. `ratios` is empty where something could not be measured."""

    goal: Goal
    ours: Sequence[float]
    theirs: Sequence[float]
    ratios: Sequence[float]
    met: bool | None

    @property
    def ratio(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios)


def _series(samples: Samples, job: str, kind: str, figure: str) -> list[float | None]:
    return [figures.get(figure) for figures in samples.get(job, {}).get(kind, ())]


def judge(samples: Samples, goal: Goal) -> Verdict:
    """What the rounds say of a goal. A ratio is of one round: rounds differ more than machines do."""
    ours = _series(samples, goal.job, "pageferry", goal.figure)
    theirs = _series(samples, goal.job, goal.against, goal.figure)
    both = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    known = [a for a in ours if a is not None], [b for b in theirs if b is not None]
    if goal.absolute is not None:
        met = statistics.median(known[0]) <= goal.absolute if known[0] else None
        return Verdict(goal, *known, [a / b for a, b in both if b], met)
    # "Times as fast" of a time is the other's through ours; of a rate it is ours through the other's.
    inverse = goal.least is not None and not goal.figure.endswith("_per_s")
    ratios = [(b / a if inverse else a / b) for a, b in both if a > 0 and b > 0]
    if not ratios:
        return Verdict(goal, *known, (), None)
    median = statistics.median(ratios)
    if goal.least is not None:
        return Verdict(goal, *known, ratios, median >= goal.least)
    return Verdict(goal, *known, ratios, None if goal.most is None else median <= goal.most)
