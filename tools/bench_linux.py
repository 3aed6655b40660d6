"""A Debian kernel on Pageferry beside stock QEMU 7.2 (TCG), interleaved: CPU time of the whole process.

    python -m tools.bench_linux                     5 rounds: build/bench/linux.json
    python -m tools.bench_linux --small --rounds 1  little of everything, to see that it runs

Both have the same kernel, initrd and command line, and 128 MiB. Stock runs its `pc`: its `microvm` does not
get this kernel to /init under TCG.

    boot        from the process's start to /init
    fork        processes that do nothing, one after the other
    pipeline    seq, gzip, gunzip and sha256sum at once
    ports       IN from a port that no device has, by a program that may
    console     text by the serial port: interrupts, and port I/O of a device
    sleeps      a program that sleeps 100 us again and again: each ends by a timer interrupt and from a halt

The timer is each machine's own: here the 8254, which takes four port accesses for a sleep, on stock the local
APIC. Serial interrupts are not compared: how many the same text takes is another number on each machine.

Prints medians of CPU seconds and of the clock, and ratios within a round, and asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import statistics
import struct
import sys
import tempfile
import time

from tools.demo_screen import table
from tools.linux_guest import READY, SHELL, Console, kernel_options
from tools.linux_images import ImagesMissing
from tools.vm_process import ROOT, VM, StockVM, VmError

APPEND = "console=ttyS0 panic=-1 quiet loglevel=2 tsc=reliable"
MACHINES: dict[str, tuple[type[VM], str]] = {
    "pageferry": (VM, "microvm"),
    "stock": (StockVM, "pc"),
}
JOBS = {
    "fork": "i=0; while [ $i -lt {n} ]; do /bin/busybox true; i=$((i+1)); done",
    "pipeline": "for i in $(seq 1 {n}); do seq 1 2000 | gzip -c | gunzip -c | sha256sum; done > /dev/null",
    "ports": "for i in $(seq 1 {n}); do /tmp/ports; done",
    "console": "seq 1 {n}00",
    "sleeps": "for i in $(seq 1 {n}); do /tmp/sleeps; done",
}
AMOUNTS = {"fork": 300, "pipeline": 30, "ports": 40, "console": 80, "sleeps": 10}
TITLES = {"boot": "boot to /init", **{job: job for job in JOBS}}

Figures = dict[str, tuple[float, float]]
"""Job -> CPU seconds and seconds by the clock."""


PORT_READS = 100_000
SLEEPS = 1000
SLEEP_NS = 100_000


def port_reader() -> bytes:
    """A program that reads port 0x300 so many times."""
    code = bytes.fromhex("b8ac000000 bf03000000 0f05 bb") + struct.pack("<I", PORT_READS)  # iopl(3)
    code += bytes.fromhex("66ba0003 ec ffcb 75fb b83c000000 31ff 0f05")  # loop: in (%dx), %al; exit(0)
    return program(code)


def sleeper() -> bytes:
    """A program that sleeps so many times."""
    code = bytes.fromhex("bb") + struct.pack("<I", SLEEPS)
    code += bytes.fromhex("b823000000 488d3d11000000 31f6 0f05 ffcb 75ec")  # loop: nanosleep(&time, 0)
    code += bytes.fromhex("b83c000000 31ff 0f05")  # exit(0)
    return program(code + struct.pack("<QQ", 0, SLEEP_NS))


def program(code: bytes) -> bytes:
    """The smallest ELF file that runs this."""
    base, begin = 0x400000, 64 + 56
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, base + begin, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    length = begin + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, length, length, 4096) + code


def cpu_seconds(machine: VM) -> float:
    """Of the whole process, all threads, so far."""
    fields = pathlib.Path(f"/proc/{machine.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def one_round(kind: str, part: int) -> Figures:
    """Boot one machine and have it do every job, 1/`part` of each. Raises VmError."""
    machine_class, machine_type = MACHINES[kind]
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="pageferry-bench-") as folder:
        async with Console(pathlib.Path(folder) / "console") as console:
            options = ("-M", machine_type, "-cpu", "qemu64", *kernel_options(SHELL, APPEND))
            began = time.monotonic()
            async with machine_class(kind, *options, serial=console.option) as machine:
                await console.wait(READY, 120)
                figures["boot"] = cpu_seconds(machine), time.monotonic() - began
                for name, made in (("ports", port_reader()), ("sleeps", sleeper())):
                    escaped = "".join(f"\\{byte:03o}" for byte in made)
                    await console.run(f"printf '{escaped}' > /tmp/{name} && chmod +x /tmp/{name}")
                for job, line in JOBS.items():
                    cpu, began = cpu_seconds(machine), time.monotonic()
                    await console.run(line.format(n=max(AMOUNTS[job] // part, 1)), 300)
                    figures[job] = cpu_seconds(machine) - cpu, time.monotonic() - began
    return figures


def measure(rounds: int, kinds: list[str], part: int) -> list[dict[str, Figures]]:
    """All rounds, in turns of who goes first; one that does not count goes before, if there are several."""
    samples = []
    for turn in range(-1 if rounds > 1 else 0, rounds):
        done = {kind: asyncio.run(one_round(kind, part)) for kind in kinds[:: 1 if turn % 2 == 0 else -1]}
        for kind in kinds:
            shown = " ".join(f"{job}={cpu:.2f}" for job, (cpu, _) in done[kind].items())
            print(f"round {turn + 1} {kind} {shown}", file=sys.stderr, flush=True)
        if turn >= 0:
            samples.append(done)
    return samples


def summarise(samples: list[dict[str, Figures]], kinds: list[str]) -> list[str]:
    """A table of medians, and of the ratios of ours to stock's."""
    rows = []
    for job, title in TITLES.items():
        cells = [f"{statistics.median(sample[kind][job][0] for sample in samples):.2f}" for kind in kinds]
        if len(kinds) == 2:
            pairs = [(sample[kinds[0]][job][0], sample[kinds[1]][job][0]) for sample in samples]
            cells.append(f"{statistics.median(one / max(other, 0.01) for one, other in pairs):.2f}")
        rows.append([f"{title}, CPU s", *cells])
    return table(["Debian kernel, median", *kinds, *(["ratio"] if len(kinds) == 2 else [])], rows)


def main(arguments: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_linux", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--small", action="store_true", help="little of everything: the figures mean nothing")
    parser.add_argument("--without-stock", action="store_true", help="leave stock QEMU out")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "bench" / "linux.json")
    chosen = parser.parse_args(arguments)
    kinds = ["pageferry"] if chosen.without_stock else list(MACHINES)
    try:
        samples = measure(max(1, chosen.rounds), kinds, 10 if chosen.small else 1)
    except ImagesMissing as error:
        print(f"Left out: no Debian kernel: {error}", file=sys.stderr)
        return 0
    except VmError as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    print(*summarise(samples, kinds), sep="\n")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(samples, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
