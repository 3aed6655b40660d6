"""Pageferry's page path beside stock QEMU 7.2 (TCG), the same guests and jobs, interleaved (`make bench`).

    python -m tools.bench                     all jobs, 5 rounds: build/bench/pages.{txt,json,svg}
    python -m tools.bench --only sparse       one of them
    python -m tools.bench --small --rounds 1  little of everything, to see that it runs

A round runs each job on both machines one after the other, in turns of who goes first; one round that does
not count goes before. Ratios are taken within a round, since rounds of a machine with other work differ
more than the programs do. Both boot the same ELF files, move over the same kind of socket with the same
parameters, and are looked at from outside: by the clock of the one who asked, by the time stamps of their
events, by the guest. Each guest's memory is checked. Prints medians, ratios and goals, asserts nothing of
them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import platform
import sys
import time

from tools.bench.jobs import JOBS, SMALL, Figures, Size, limit
from tools.bench.pair import NotMeasured
from tools.bench.picture import picture_of
from tools.bench.report import table_of
from tools.vm_process import ROOT, VM, StockVM, VmError

MACHINES: dict[str, type[VM]] = {"pageferry": VM, "stock": StockVM}
LIMITED = {"precopy_unix": "unix", "precopy_tcp": "tcp"}
"""Jobs that a plain C program does, too, and how."""
GROWTH_ROUNDS = 3
"""It starts eighteen pairs of machines."""

Collected = dict[str, dict[str, list[Figures]]]


TRIES = 5
"""A sample in which nothing of the kind has happened does not count, and another one is taken."""


async def _one(job: str, kind: str, size: Size) -> Figures:
    """Raises AssertionError: it never happens."""
    if kind == "limit":
        return limit(LIMITED[job], size)
    for _ in range(TRIES):
        try:
            return await JOBS[job](MACHINES[kind], size)
        except NotMeasured as why:
            print(f"{job} {kind} does not count: {why}", file=sys.stderr, flush=True)
    raise AssertionError(f"{job}: nothing to measure in {TRIES} tries")


async def measure(jobs: list[str], kinds: list[str], rounds: int, size: Size) -> Collected:
    """All rounds of all jobs. Raises VmError, AssertionError: a machine failed, or a guest was damaged."""
    samples: Collected = {job: {} for job in jobs}
    for turn in range(-1 if rounds > 1 else 0, rounds):
        for job in jobs:
            if job == "growth" and not 0 <= turn < GROWTH_ROUNDS:
                continue
            names = [*kinds, *(["limit"] if job in LIMITED else [])]
            for kind in names if turn % 2 == 0 else names[::-1]:
                figures = await _one(job, kind, size)
                shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
                print(f"round {turn + 1} {job} {kind} {shown}", file=sys.stderr, flush=True)
                if turn >= 0:
                    samples[job].setdefault(kind, []).append(figures)
    return samples


def main(arguments: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--small", action="store_true", help="little of everything: the figures mean nothing")
    parser.add_argument("--only", action="append", choices=list(JOBS), help="this job (may be given again)")
    parser.add_argument("--without-stock", action="store_true", help="leave stock QEMU out")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "bench" / "pages")
    chosen = parser.parse_args(arguments)
    kinds = ["pageferry"] if chosen.without_stock else list(MACHINES)
    size = SMALL if chosen.small else Size()
    try:
        samples = asyncio.run(measure(chosen.only or list(JOBS), kinds, max(1, chosen.rounds), size))
    except (VmError, AssertionError) as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    lines = table_of(samples)
    print(*lines, sep="\n")
    output: pathlib.Path = chosen.output
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": platform.platform(), "date": time.strftime("%Y-%m-%d"), "rounds": chosen.rounds}
    output.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    output.with_suffix(".json").write_text(json.dumps({**about, "samples": samples}, indent=1) + "\n")
    output.with_suffix(".svg").write_text(picture_of(samples, f"{about['date']}, {chosen.rounds} rounds"))
    print(f"Table, samples and picture: {output}.txt, .json, .svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
