"""The bench's results as lines of a table. ~"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tools.bench.goals import GOALS, Samples, Verdict, judge
from tools.demo_screen import table

__all__ = ["table_of"]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _median(values: Sequence[float]) -> str:
    return _number(statistics.median(values)) if values else "-"


def _row(verdict: Verdict) -> list[str]:
    goal = verdict.goal
    ratio = "-"
    if verdict.ratios:
        ratio = f"{verdict.ratio:.2f} ({min(verdict.ratios):.2f}-{max(verdict.ratios):.2f})"
    said = {True: "met", False: "short", None: "" if verdict.ratios else "not measurable"}[verdict.met]
    return [goal.text, _median(verdict.ours), _median(verdict.theirs), ratio, goal.wanted, said]


def table_of(samples: Samples) -> list[str]:
    """A row for each goal whose job was run."""
    rows = [_row(judge(samples, goal)) for goal in GOALS if goal.job in samples]
    return table(["median of the rounds", "pageferry", "stock", "ratio (span)", "goal", ""], rows)
