"""Pageferry beside stock QEMU 7.2 (TCG), the same guest and the same job, interleaved (`make bench`).

    python -m tools.compare --rounds 5 --output build/compare.json

A 256 MiB guest dirties 100 MiB of it in a loop (the dirtier; both sides boot the same ELF file) and moves
over a unix socket without a bandwidth limit, once by precopy and once by postcopy, started as soon as the
migration is active. A round runs both machines one after the other, in turns of who goes first. Total time,
downtime and throughput are what query-migrate says; every move is checked by the dirtier's rule. Prints
medians and ratios, asserts nothing.

A cold machine is slow: memory that the host never gave it costs several times more at its first touch, so
one round that does not count goes before. Figures of different runs do not compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import platform
import statistics
import sys
from typing import Any

from tools import guest_builder
from tools.demo_screen import table
from tools.guest_checks import DIRTIER_END, DIRTIER_START, check_dirtier
from tools.vm_process import VM, StockVM, VmError

RAM_MIB = 256
NO_LIMIT_BYTES_PER_S = 100_000_000_000
DOWNTIME_LIMIT_MS = 300
"""QEMU's default. At full speed the 100 MiB fit into it, so precopy converges against the endless loop."""

MACHINES: dict[str, type[VM]] = {"pageferry": VM, "stock": StockVM}
MODES = ("precopy", "postcopy")
FIGURES = {"total-time": "total time, ms", "downtime": "downtime, ms", "mbps": "throughput, Mbit/s"}

Sample = dict[str, float]


async def one_move(machine: type[VM], mode: str) -> Sample:
    """Start two machines, migrate, check the guest, and return the figures. Raises VmError."""
    image = str(guest_builder.build("dirtier"))
    options = ["-M", "microvm", "-m", str(RAM_MIB), "-kernel", image, "-append", "rounds=16"]
    async with (
        machine("source", *options) as source,
        machine("target", *options, "-incoming", "defer") as target,
    ):
        await source.wait_output(lambda text: "B" in text)
        for vm in (source, target):
            await vm.set_capabilities(events=True, postcopy_ram=mode == "postcopy")
        uri = f"unix:{target.folder / 'migration'}"
        await source.qmp(
            "migrate-set-parameters", max_bandwidth=NO_LIMIT_BYTES_PER_S, downtime_limit=DOWNTIME_LIMIT_MS
        )
        await target.qmp("migrate-incoming", uri=uri)
        await source.qmp("migrate", uri=uri)
        if mode == "postcopy":
            await source.wait_event("MIGRATION", lambda event: event["data"]["status"] == "active")
            await source.qmp("migrate-start-postcopy")
        await source.wait_migration()
        await target.wait_migration()
        reply: dict[str, Any] = await source.qmp("query-migrate")
        await target.wait_run_state("running")
        await target.qmp("stop")
        check_dirtier(await target.first_bytes(DIRTIER_START, DIRTIER_END))
        return {
            "total-time": reply["total-time"],
            "downtime": reply["downtime"],
            "mbps": round(reply["ram"]["mbps"], 1),
            "transferred": reply["ram"]["transferred"],
            "passes": reply["ram"]["dirty-sync-count"],
            "requests": reply["ram"]["postcopy-requests"],
        }


async def measure(rounds: int, names: list[str]) -> dict[str, dict[str, list[Sample]]]:
    """All samples: mode -> machine -> one sample a round."""
    samples: dict[str, dict[str, list[Sample]]] = {mode: {name: [] for name in names} for mode in MODES}
    for turn in range(-1, rounds):
        order = names if turn % 2 == 0 else names[::-1]
        for mode in MODES:
            for name in order:
                sample = await one_move(MACHINES[name], mode)
                if turn >= 0:
                    samples[mode][name].append(sample)
                    print(f"round {turn + 1} {mode:<8} {name:<9} {sample}", file=sys.stderr, flush=True)
    return samples


def summarise(samples: dict[str, dict[str, list[Sample]]]) -> list[str]:
    """A table of medians and, where both ran, the ratio of ours to stock's."""
    names = list(next(iter(samples.values())))
    rows = []
    for mode in MODES:
        for key, title in FIGURES.items():
            medians = [statistics.median(sample[key] for sample in samples[mode][name]) for name in names]
            cells = [f"{median:,.0f}" for median in medians]
            if len(medians) == 2:
                cells.append(f"{medians[0] / medians[1]:.2f}" if medians[1] else "-")
            rows.append([f"{mode}: {title}", *cells])
    return table(["median", *names, *(["ratio"] if len(names) == 2 else [])], rows)


def main(arguments: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--only", choices=list(MACHINES), help="leave the other machine out")
    parser.add_argument("--output", type=pathlib.Path, default=guest_builder.ROOT / "build" / "compare.json")
    chosen = parser.parse_args(arguments)
    names = [chosen.only] if chosen.only else list(MACHINES)
    try:
        samples = asyncio.run(measure(max(1, chosen.rounds), names))
    except (VmError, AssertionError) as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    print(*summarise(samples), sep="\n")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(
        json.dumps({"machine": platform.platform(), "samples": samples}, indent=1) + "\n"
    )
    print(f"All samples: {chosen.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
