"""The bench's results as a picture (SVG): ratios to stock with their goals, and cost as RAM grows. ~"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from html import escape

from tools.bench.goals import GOALS, Samples, Verdict, judge

__all__ = ["picture_of"]

WIDTH, LABELS, ROW = 980, 400, 22
COLOURS = {"pageferry": "#0a6e4f", "stock": "#b5501b"}
NO_GOAL = "#777777"
STYLE = "font-family: sans-serif; font-size: 12px; background: white"


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#bbb", width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _dot(x: float, y: float, colour: str, radius: float = 4) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'


def _advantage(verdict: Verdict, ratio: float) -> float:
    """How many times better than the other: above 1 is better, whichever way the figure counts."""
    return ratio if verdict.goal.least is not None else 1 / ratio


def _ratios(verdicts: Sequence[Verdict], top: float) -> Iterable[str]:
    """A row for each goal: the rounds, the median, and the goal as a bar, on a logarithmic axis."""

    def place(advantage: float) -> float:
        part = (math.log2(max(0.25, min(16.0, advantage))) + 2) / 6
        return LABELS + part * (WIDTH - LABELS - 30)

    bottom = top + ROW * len(verdicts)
    for power in range(-2, 5):
        x = place(2.0**power)
        yield _line(x, top, x, bottom, "#222" if power == 0 else "#ddd")
        yield _text(x, top - 6, f"{2.0**power:g}x", "middle")
    for number, verdict in enumerate(verdicts):
        y = top + ROW * (number + 0.5)
        yield _text(LABELS - 12, y + 4, verdict.goal.text.strip(), "end")
        goal = verdict.goal.least or (1 / verdict.goal.most if verdict.goal.most else None)
        if goal is not None:
            yield _line(place(goal), y - 8, place(goal), y + 8, "#333", 3)
        colour = NO_GOAL if goal is None else COLOURS["pageferry" if verdict.met else "stock"]
        for ratio in verdict.ratios:
            yield _dot(place(_advantage(verdict, ratio)), y, colour + "66", 3)
        if verdict.ratios:
            yield _dot(place(_advantage(verdict, verdict.ratio)), y, colour, 5)


def _growth(samples: Samples, kind: str, figure: str) -> list[tuple[float, float]]:
    """(MiB, ms) of one kind of machine, medians over the rounds."""
    found: dict[float, list[float]] = {}
    for figures in samples["growth"].get(kind, ()):
        for name, value in figures.items():
            if match := re.fullmatch(rf"{figure}_(\d+)_mib_ms", name):
                found.setdefault(float(match[1]), []).append(value)
    return [(mib, statistics.median(values)) for mib, values in sorted(found.items())]


def _plot(samples: Samples, figure: str, title: str, left: float, top: float) -> Iterable[str]:
    width, height = WIDTH / 2 - 90, 200.0
    series = {kind: _growth(samples, kind, figure) for kind in samples["growth"]}
    points = [point for line in series.values() for point in line]
    if not points:
        return
    most_mib, most_ms = max(mib for mib, _ in points), max(ms for _, ms in points)
    yield _text(left, top - 12, title)
    yield _line(left, top, left, top + height, "#222")
    yield _line(left, top + height, left + width, top + height, "#222")
    yield _text(left - 4, top + 8, f"{most_ms:.0f} ms", "end")
    yield _text(left - 4, top + height, "0", "end")
    for mib in sorted({mib for mib, _ in points}):
        yield _text(left + mib / most_mib * width, top + height + 16, f"{mib / 1024:g}", "middle")
    yield _text(left + width, top + height + 32, "GiB", "end")
    for number, (kind, line) in enumerate(series.items()):
        places = [(left + mib / most_mib * width, top + height - ms / most_ms * height) for mib, ms in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{COLOURS[kind]}" stroke-width="2"/>'
        yield from (_dot(x, y, COLOURS[kind]) for x, y in places)
        yield _text(left + 12, top + 14 + 16 * number, kind, colour=COLOURS[kind])


def picture_of(samples: Samples, caption: str) -> str:
    """An SVG document."""
    verdicts = [judge(samples, goal) for goal in GOALS if goal.job in samples]
    parts = [
        _text(20, 24, f"Pageferry beside stock QEMU 7.2: times as good (dots: rounds; bar: goal). {caption}")
    ]
    top = 66.0
    parts += _ratios(verdicts, top)
    height = top + ROW * len(verdicts) + 20
    if "growth" in samples:
        top = height + 40
        parts += _plot(samples, "untouched", "ms, precopy, RAM grows, 100 MiB touched", 70, top)
        parts += _plot(samples, "touched", "ms, precopy, touched memory grows", WIDTH / 2 + 60, top)
        height = top + 250
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" style="{STYLE}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
