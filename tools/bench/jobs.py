"""What is measured: each job runs one kind of machine once and gives figures; the same for both kinds.

A figure is a number in the unit that its name ends with. Nothing here compares or judges.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import struct
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tools.bench.pair import MIB, Pair, compiled_limit, open_pair, peak_bytes, wait_status, warm
from tools.guest_checks import audit, check_dirtier
from tools.vm_process import VM, StockVM

__all__ = ["JOBS", "Figures", "Size", "limit"]

Figures = dict[str, float]

START = MIB
"""Where the guests' working sets begin."""

HELD_BACK_BYTES_PER_S = 10 * MIB
"""So slow that hardly anything is at the destination when postcopy begins."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    ram_mib: int = 1024
    sparse_mib: int = 8192
    touched_mib: int = 100
    seconds: float = 1.0
    """How long a rate is measured."""
    steps: int = 5
    """Sizes in each plot of growth, each twice the one before."""


SMALL = Size(ram_mib=32, sparse_mib=128, touched_mib=8, seconds=0.1, steps=2)


def _tsc_per_us() -> float:
    """Ticks of the time stamp counter: emulated guests of both kinds read the host's."""
    with open("/proc/cpuinfo") as lines:
        return next(float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz"))


# ---- paused guests: how fast pages go ----


async def _paused(
    machine: type[VM], touched: int, ram: int, *, zero: int = 0, transport: str = "unix"
) -> Figures:
    words = f"start={START:#x} end={START + touched * MIB:#x} zero={zero}"
    async with open_pair(machine, "filler", words, ram, transport=transport) as pair:
        await pair.source.qmp("stop")
        warm(touched * 3 // 2 if not zero else 64)
        moved = await pair.move()
        last = START + (touched - 1) * MIB
        if await pair.source.memory(last, MIB) != await pair.target.memory(last, MIB):
            raise AssertionError("the last megabyte is another one at the destination")
        beyond = [peak_bytes(vm) - touched * MIB for vm in (pair.source, pair.target)]
        return {
            "total_ms": moved.total,
            "transferred_mb": moved.shown["ram"]["transferred"] / 1e6,
            "source_beyond_ram_mb": beyond[0] / 1e6,
            "target_beyond_ram_mb": beyond[1] / 1e6,
        }


async def precopy_unix(machine: type[VM], size: Size) -> Figures:
    """Precopy of a paused guest with pages of content, over a unix socket."""
    return await _paused(machine, size.ram_mib, size.ram_mib + 64)


async def precopy_tcp(machine: type[VM], size: Size) -> Figures:
    """The same over tcp on the loopback interface."""
    return await _paused(machine, size.ram_mib, size.ram_mib + 64, transport="tcp")


async def zero_pages(machine: type[VM], size: Size) -> Figures:
    """Precopy of a paused guest that has written zeroes to all its memory."""
    return await _paused(machine, size.ram_mib, size.ram_mib + 64, zero=1)


async def sparse(machine: type[VM], size: Size) -> Figures:
    """Precopy of a paused guest that has touched a small part of its memory."""
    return await _paused(machine, size.touched_mib, size.sparse_mib)


def limit(transport: str, size: Size) -> Figures:
    """What a C program takes that only moves memory."""
    command = [str(compiled_limit()), transport, str(size.ram_mib)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"total_ms": float(done.stdout) * 1000}


# ---- running guests ----


def _dirtier(size: Size) -> tuple[str, int, int]:
    end = START + size.touched_mib * MIB
    return f"start={START:#x} end={end:#x} rounds=16", size.touched_mib * 2 + 56, end


async def _check_dirtier(pair: Pair, end: int) -> None:
    await pair.target.wait_run_state("running")
    await pair.target.qmp("stop")
    check_dirtier(await pair.target.first_bytes(START, end))


async def precopy_dirtier(machine: type[VM], size: Size) -> Figures:
    """Precopy of the running dirtier: all of its pages over and over."""
    words, ram, end = _dirtier(size)
    async with open_pair(machine, "dirtier", words, ram) as pair:
        warm(size.touched_mib * 3 // 2)
        moved = await pair.move()
        await _check_dirtier(pair, end)
        return moved.figures


async def postcopy_dirtier(machine: type[VM], size: Size) -> Figures:
    """Postcopy of the running dirtier, asked for as soon as the migration is active.

    Precopy is held back, so that hardly anything is there when it begins and it cannot be over before. Stock
    looks for the wish at the end of its windows of 100 ms, hence also the time from the guest's stop on.
    """
    words, ram, end = _dirtier(size)
    async with open_pair(machine, "dirtier", words, ram) as pair:
        warm(size.touched_mib * 3 // 2)
        moved = await pair.move_in_postcopy(HELD_BACK_BYTES_PER_S)
        await _check_dirtier(pair, end)
        return moved.figures


async def _auditor_moves(machine: type[VM], size: Size, ratio: int) -> Figures:
    words = f"pages={size.touched_mib * 128} ratio={ratio} beat=1 flush=1"
    async with open_pair(machine, "auditor", words, size.touched_mib + 56, wait_for="H") as pair:
        warm(size.touched_mib)
        moved = await pair.move()
        heard = pair.target.output().count("H")
        await pair.target.wait_output(lambda text: text.count("H") > heard + 1)
        verdict = audit(pair.source.output(), pair.target.output())
        if not verdict.is_good:
            raise AssertionError(f"the auditor complains: {verdict}")
        return moved.figures


async def precopy_auditor_fast(machine: type[VM], size: Size) -> Figures:
    """Precopy of the running auditor, a quarter of its pages written in a round."""
    return await _auditor_moves(machine, size, 4)


async def precopy_auditor_slow(machine: type[VM], size: Size) -> Figures:
    """Precopy of the running auditor, a sixty-fourth of its pages written in a round."""
    return await _auditor_moves(machine, size, 64)


# ---- the latency of one page, measured by the guest ----

LOG = START
RING = 65536
FAULT_US = 3.0
"""A touch that takes longer has waited: others take some 100 ns, and a page from afar 10 us at least."""


async def _touches(pair: Pair, since: int) -> list[float]:
    """Touches at the destination, in microseconds."""
    (until,) = struct.unpack("<I", await pair.target.memory(LOG, 4))
    ring = struct.unpack(f"<{2 * RING}I", await pair.target.memory(LOG + 4096, 8 * RING))
    per_us = _tsc_per_us()
    count = min((until - since) % (1 << 32), RING)
    return [ring[(until - 1 - i) % RING * 2 + 1] / per_us for i in range(count)]


async def _latency(
    machine: type[VM], mib: int, pause: int, postcopy_bandwidth: int, seconds: float
) -> Figures:
    words = f"pages={mib * 256} pause={pause} log={LOG:#x}"
    async with open_pair(machine, "prober", words, mib + 64) as pair:
        warm(mib * 3 // 2)
        await pair.prepare(
            postcopy=True, max_bandwidth=HELD_BACK_BYTES_PER_S, max_postcopy_bandwidth=postcopy_bandwidth
        )
        started_ms = await pair.begin()
        await pair.begin_postcopy()
        await pair.target.wait_event("RESUME")
        if postcopy_bandwidth:
            await asyncio.sleep(seconds)
            await pair.target.qmp("stop")
            await pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        moved = await pair.finish(started_ms)
        if not postcopy_bandwidth:
            await pair.target.qmp("stop")
        (since,) = struct.unpack("<I", await pair.source.memory(LOG, 4))
        waits = sorted(took for took in await _touches(pair, since) if took > FAULT_US)
        if "X" in pair.target.output() or not waits:
            raise AssertionError("the prober has found a wrong page, or no page was missing")
        figures = {"total_ms": moved.total, "faults": len(waits)}
        for name, part in (("median_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99)):
            figures[name] = waits[min(len(waits) - 1, int(len(waits) * part))]
        return figures


async def latency_quiet(machine: type[VM], size: Size) -> Figures:
    """One page touched at a time, the background push held back to 20 MB/s by max-postcopy-bandwidth."""
    return await _latency(machine, min(64, size.ram_mib), 1_000_000, 20_000_000, size.seconds)


async def latency_pushed(machine: type[VM], size: Size) -> Figures:
    """One page touched at a time while all others are pushed as fast as the socket takes them."""
    return await _latency(machine, size.ram_mib, 20_000, 0, size.seconds)


# ---- bitmap sync ----

STOCK_SYNC = re.compile(
    r"@(\d+\.\d+):migration_bitmap_sync_start *\n\d+@(\d+\.\d+):migration_bitmap_sync_end dirty_pages (\d+)"
)
OUR_SYNC = re.compile(r"bitmap sync: (\d+) pages new, (\d+) us")
MOST = 0.9
"""A sync counts as fully dirty if so many of the guest's pages were new."""


def syncs(text: str) -> list[tuple[int, float]]:
    """New pages and microseconds of each bitmap sync, from what a source has written: QEMU's trace events,
    or our log."""
    ours = [(int(found[1]), float(found[2])) for found in OUR_SYNC.finditer(text)]
    stock = [
        (int(found[3]), (float(found[2]) - float(found[1])) * 1e6) for found in STOCK_SYNC.finditer(text)
    ]
    return ours or stock


async def _syncs(machine: type[VM], size: Size, guest: str, *, passes: int | None) -> list[tuple[int, float]]:
    """Those of a guest that writes all its memory: once, and then stands still, or for ever."""
    log = ("-trace", "migration_bitmap_sync*") if issubclass(machine, StockVM) else ("-d", "migration")
    words = f"start={START:#x} end={START + size.ram_mib * MIB:#x} rounds=1"
    options = ("-msg", "timestamp=on", *log)
    async with open_pair(machine, guest, words, size.ram_mib + 64, options=options) as pair:
        if passes is None:
            await pair.source.qmp("stop")
        warm(size.ram_mib)
        limit = 300 if passes is None else 1
        await pair.prepare(max_bandwidth=max(50, size.ram_mib) * 2 * MIB, downtime_limit=limit)
        await pair.begin()
        if passes is None:
            await wait_status(pair.target, "completed")
        else:
            await pair.source.wait_event(
                "MIGRATION_PASS", lambda event: event["data"]["pass"] == passes, timeout_s=60.0
            )
            await pair.source.qmp("migrate_cancel")
            await wait_status(pair.source, "cancelled")
        return syncs(pair.source.messages())


async def bitmap_sync(machine: type[VM], size: Size) -> Figures:
    """A bitmap sync of a guest that has written nothing since the last, and of one that has written all."""
    clean = await _syncs(machine, size, "filler", passes=None)
    full = await _syncs(machine, size, "dirtier", passes=5)
    most = size.ram_mib * (MIB // 4096) * MOST
    figures = {"clean_us": [us for new, us in clean if new == 0][-1:]}
    figures["dirty_us"] = [us for new, us in full if new >= most]
    return {name: statistics.median(times) for name, times in figures.items() if times}


# ---- the guest's own speed ----


async def _said_per_s(vm: VM, seconds: float) -> float:
    """How often a guest says 'B' in a second."""
    loop = asyncio.get_running_loop()
    before, started_s = vm.output().count("B"), loop.time()
    await asyncio.sleep(seconds)
    after, ended_s = vm.output().count("B"), loop.time()
    return (after - before) / (ended_s - started_s)


async def _speed(machine: type[VM], size: Size, guest: str, words: str, each: int) -> Figures:
    async with open_pair(machine, guest, words, 128) as pair:
        figures = {"idle_per_s": each * await _said_per_s(pair.source, size.seconds)}
        await pair.prepare(postcopy=True, max_bandwidth=MIB)
        started_ms = await pair.begin()
        await wait_status(pair.source, "active")
        figures["dirty_log_per_s"] = each * await _said_per_s(pair.source, size.seconds)
        await pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        await pair.source.qmp("migrate-start-postcopy")
        await pair.finish(started_ms)
        figures["after_postcopy_per_s"] = each * await _said_per_s(pair.target, size.seconds)
        return figures


async def speed_stores(machine: type[VM], size: Size) -> Figures:
    """Stores a second, one to a page, over 64 MiB."""
    return await _speed(
        machine, size, "dirtier", f"start={START:#x} end={START + 64 * MIB:#x} rounds=2", 32768
    )


async def speed_ports(machine: type[VM], size: Size) -> Figures:
    """Reads of an I/O port a second."""
    return await _speed(machine, size, "ports", "count=5000", 5000)


# ---- growth ----


async def growth(machine: type[VM], size: Size) -> Figures:
    """Precopy of paused guests: memory that was never touched, and memory with content."""
    figures = {}
    for step in range(size.steps):
        ram = (size.sparse_mib * 2) >> step
        figures[f"untouched_{ram}_mib_ms"] = (await _paused(machine, size.touched_mib, ram))["total_ms"]
    for step in range(size.steps - 1):
        touched = (size.ram_mib * 2) >> step
        figures[f"touched_{touched}_mib_ms"] = (await _paused(machine, touched, size.ram_mib * 2 + 64))[
            "total_ms"
        ]
    return figures


Job = Callable[[type[VM], Size], Awaitable[Figures]]

JOBS: dict[str, Job] = {
    job.__name__: job
    for job in (
        precopy_unix,
        precopy_tcp,
        zero_pages,
        sparse,
        precopy_dirtier,
        precopy_auditor_fast,
        precopy_auditor_slow,
        postcopy_dirtier,
        latency_quiet,
        latency_pushed,
        bitmap_sync,
        speed_stores,
        speed_ports,
        growth,
    )
}
