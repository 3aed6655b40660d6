"""What the demo shows: a block of lines redrawn in place in a terminal, plain lines anywhere else.

This file formats figures and writes text; it knows no VM. The figures are `query-migrate` replies.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

Message = dict[str, Any]

BLOCKS = " ▁▂▃▄▅▆▇█"
MAP_WIDTH = 64
PLAIN_INTERVAL_S = 1.0
"""A file gets one progress line a second: enough to follow, few enough to read afterwards."""

MISSING = "-"


def page_map(fractions: Sequence[float]) -> str:
    """One character for each part of RAM, filled as far as its pages have arrived (0.0 to 1.0)."""
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[min(top, max(int(part > 0), int(part * top)))] for part in fractions)


def figure(message: Message, *path: str, unit: str = "", per: int = 1) -> str:
    """The number at `path` of a reply, divided by `per`, thousands set apart; "-" if there is none."""
    value: Any = message
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    if not isinstance(value, int | float):
        return MISSING
    if per != 1:
        value = value / per
    digits = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return f"{digits} {unit}".rstrip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines


@dataclass(frozen=True)
class Progress:
    """Both ends of a migration at one moment."""

    phase: str
    elapsed_s: float
    megabytes_per_s: float
    source: Message
    destination: Message

    @property
    def arrived(self) -> float:
        """How much of RAM needs no more sending, as the source sees it now (0.0 to 1.0)."""
        ram = self.source.get("ram", {})
        if self.source.get("status") == "completed":
            return 1.0
        total = ram.get("total", 0)
        return (total - ram.get("remaining", total)) / total if total else 0.0

    def map_fractions(self) -> list[float]:
        """The destination's page map, or the one fraction known, as a bar, if it shows none."""
        shown = self.destination.get("x-page-map")
        if isinstance(shown, list) and shown:
            return [float(part) for part in shown]
        return [min(1.0, max(0.0, self.arrived * MAP_WIDTH - place)) for place in range(MAP_WIDTH)]

    def figures(self) -> str:
        """Everything but the map, on one line."""
        ram = self.source.get("ram", {})
        pages = ram.get("normal", 0) + ram.get("duplicate", 0)
        return (
            f"{self.phase:<17} {self.elapsed_s:5.1f} s  {pages:>8,} pages  {self.megabytes_per_s:7.1f} MB/s"
            f"  pass {ram.get('dirty-sync-count', 0)}  dirty rate {ram.get('dirty-pages-rate', 0):,} pages/s"
            f"  requests {ram.get('postcopy-requests', 0):,}"
        )


class Screen:
    """Writes progress to `stream`: redrawn in place if `live`, else as plain lines."""

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        self._stream = stream
        self._live = live
        self._drawn_lines = 0
        self._last_phase = ""
        self._next_plain_s = 0.0

    def say(self, *lines: str) -> None:
        """Lines that stay."""
        self._drawn_lines = 0
        print(*lines, sep="\n", file=self._stream, flush=True)

    def show(self, progress: Progress) -> None:
        """Draw progress over what `show` drew before."""
        if not self._live:
            self._show_plain(progress)
            return
        lines = [f"  {progress.figures()}", f"  [{page_map(progress.map_fractions())}]"]
        up = f"\x1b[{self._drawn_lines}A" if self._drawn_lines else ""
        text = "".join(f"\x1b[2K{line}\n" for line in lines)
        print(up + text, end="", file=self._stream, flush=True)
        self._drawn_lines = len(lines)

    def _show_plain(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == self._last_phase and now < self._next_plain_s:
            return
        self._last_phase, self._next_plain_s = progress.phase, now + PLAIN_INTERVAL_S
        fractions = progress.map_fractions()
        print(
            f"  {progress.figures()}  {sum(fractions) / len(fractions):4.0%}", file=self._stream, flush=True
        )


class RateMeter:
    """Bytes per second between readings, as MB/s, over the last second of readings."""

    WINDOW = 10

    def __init__(self) -> None:
        self._readings: list[tuple[float, int]] = []

    def read(self, now_s: float, transferred_bytes: int) -> float:
        """Take a reading and return the rate."""
        self._readings = [*self._readings[-self.WINDOW :], (now_s, transferred_bytes)]
        (first_s, first_bytes), (last_s, last_bytes) = self._readings[0], self._readings[-1]
        return (last_bytes - first_bytes) / (last_s - first_s) / 1e6 if last_s > first_s else 0.0


def first_difference(one: bytes, other: bytes, page_bytes: int) -> tuple[int, int | None]:
    """How many pages differ, and the address of the first byte that does (None if none)."""
    if len(one) != len(other):
        return abs(len(one) - len(other)) // page_bytes, min(len(one), len(other))
    if one == other:
        return 0, None
    starts = range(0, len(one), page_bytes)
    different = [at for at in starts if one[at : at + page_bytes] != other[at : at + page_bytes]]
    page = different[0]
    pairs = zip(one[page : page + page_bytes], other[page : page + page_bytes], strict=True)
    return len(different), page + next(itertools.compress(itertools.count(), (a != b for a, b in pairs)))
