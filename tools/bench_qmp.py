"""The monitor beside stock QEMU 7.2's: start, round trips, big messages, memory (`make bench`).

    python -m tools.bench_qmp --rounds 5 --output build/bench_qmp.json

In each round one process of either kind is started (`-M none -S`, no devices), measured by the same client
over a unix socket, and ended, in turns of who goes first. The client is this program, a plain blocking
socket. Prints medians, the span of the rounds, and ratios; asserts nothing.

A round trip between two processes costs what the scheduler takes to wake them: on an idle machine with more
than one CPU that is most of it, and it varies with the CPUs that the two happen to get.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from tools.demo_screen import table
from tools.vm_process import ROOT

COMMANDS: dict[str, list[str]] = {
    "pageferry": [sys.executable, "-m", "vmm"],
    "stock": ["qemu-system-x86_64"],
}
OPTIONS = ("-M", "none", "-nodefaults", "-display", "none", "-S")
QUERY = b'{"execute":"query-status"}\n'
BIG_STRING_BYTES = 4 << 20
DEADLINE_S = 120.0

Sample = dict[str, float]

FIGURES: list[tuple[str, str, str]] = [
    ("greeting_ms", "start to greeting, ms", ".0f"),
    ("first_reply_ms", "start to first reply, ms", ".0f"),
    ("sequential_per_s", "query-status one by one, 1/s", ",.0f"),
    ("pipelined_per_s", "query-status pipelined, 1/s", ",.0f"),
    ("schema_ms", "query-qmp-schema, ms", ".2f"),
    ("big_string_s", "4 MiB string argument, s", ".3f"),
    ("resident_mb", "resident memory, MB", ".1f"),
]


class Connection:
    """A blocking client."""

    def __init__(self, path: pathlib.Path) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(DEADLINE_S)
            try:
                self.socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.0005)
        self._file = self.socket.makefile("rb")
        self.line()

    def line(self) -> bytes:
        """The next line. Raises EOFError at the end."""
        line = self._file.readline()
        if not line:
            raise EOFError("the monitor hung up")
        return line

    def call(self, data: bytes) -> bytes:
        """A command and its reply."""
        self.socket.sendall(data)
        return self.line()

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self.socket.close()


def sequential_per_s(connection: Connection, count: int) -> float:
    """Round trips in a second, the next command sent after the reply."""
    sock = connection.socket
    started = time.perf_counter()
    for _ in range(count):
        sock.sendall(QUERY)
        sock.recv(4096)  # a reply is one small packet
    return count / (time.perf_counter() - started)


def pipelined_per_s(connection: Connection, count: int) -> float:
    """Replies in a second when all commands are sent without waiting."""
    sender = threading.Thread(target=connection.socket.sendall, args=(QUERY * count,), name="sender")
    started = time.perf_counter()
    sender.start()
    replies = 0
    while replies < count:
        replies += connection.socket.recv(1 << 20).count(b"\n")
    sender.join()
    return count / (time.perf_counter() - started)


def seconds(connection: Connection, data: bytes, times: int) -> float:
    """The median time that a command takes."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        connection.call(data)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def resident_mb(pid: int) -> float:
    """Resident memory of a process. No guest has run: of guest RAM nothing is resident."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise AssertionError("every process has a VmRSS")


def measure(name: str, *, scale: float, big_string: bool) -> Sample:
    """One process, all figures. `scale`: the part of the usual number of commands."""
    with tempfile.TemporaryDirectory(prefix="pageferry-bench-") as folder:
        path = pathlib.Path(folder) / "qmp"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
        command = [*COMMANDS[name], *OPTIONS, "-qmp", f"unix:{path},server=on,wait=off"]
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            connection = Connection(path)
            sample = {"greeting_ms": (time.perf_counter() - started) * 1000}
            connection.call(b'{"execute":"qmp_capabilities"}')
            connection.call(QUERY)
            sample["first_reply_ms"] = (time.perf_counter() - started) * 1000
            sample["resident_mb"] = resident_mb(process.pid)
            sequential_per_s(connection, int(500 * scale))
            sample["sequential_per_s"] = sequential_per_s(connection, int(5000 * scale))
            sample["pipelined_per_s"] = pipelined_per_s(connection, int(20_000 * scale))
            sample["schema_ms"] = seconds(connection, b'{"execute":"query-qmp-schema"}', 10) * 1000
            if big_string:
                text = b"x" * BIG_STRING_BYTES
                # Refused in any case, as no descriptor comes with it; the argument is read all the same.
                data = b'{"execute":"getfd","arguments":{"fdname":"%b"}}' % text
                sample["big_string_s"] = seconds(connection, data, 1)
            connection.close()
        finally:
            process.kill()
            process.wait()
    return sample


def measure_all(rounds: int, names: Sequence[str], scale: float) -> dict[str, list[Sample]]:
    """All samples; a round that does not count goes first. The big string only in the first that counts."""
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            sample = measure(name, scale=scale, big_string=turn == 0)
            if turn >= 0:
                samples[name].append(sample)
                shown = " ".join(f"{key}={value:.4g}" for key, value in sample.items())
                print(f"round {turn + 1} {name:<9} {shown}", file=sys.stderr, flush=True)
    return samples


def summarise(samples: dict[str, list[Sample]]) -> list[str]:
    """A table of medians with the span of the rounds and, where both ran, the ratio of ours to stock's."""
    rows = []
    for key, title, form in FIGURES:
        cells, medians = [], []
        for of_one in samples.values():
            values = [sample[key] for sample in of_one if key in sample]
            medians.append(statistics.median(values))
            span = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
            cells.append(f"{medians[-1]:{form}}{span}")
        if len(medians) == 2:
            cells.append(f"{medians[0] / medians[1]:.3g}")
        rows.append([title, *cells])
    return table(["median (span)", *samples, *(["ratio"] if len(samples) == 2 else [])], rows)


def main(arguments: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_qmp", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the usual number of commands")
    parser.add_argument("--only", choices=list(COMMANDS), help="leave the other one out")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "bench_qmp.json")
    chosen = parser.parse_args(arguments)
    samples = measure_all(
        max(1, chosen.rounds), [chosen.only] if chosen.only else list(COMMANDS), chosen.scale
    )
    print(*summarise(samples), sep="\n")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(
        json.dumps({"machine": platform.platform(), "samples": samples}, indent=1) + "\n"
    )
    print(f"All samples: {chosen.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
