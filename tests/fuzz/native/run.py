"""Fuzzes the page pump in C, with AddressSanitizer and UBSan: `python -m tests.fuzz.native.run [TARGET ...]`.

    --seconds N    for each target (default 10)
    --seed N       other inputs; the same ones for the same seed and corpus
    --keep         put what reaches new branches into the corpus, tests/fixtures/fuzz/TARGET.tar.xz
    --coverage     and say which part of the pump's lines the corpus reaches
    --input FILE   run this one input (what `last-input-TARGET` is after a failure)

Needs gcc and nothing else: see fuzz.c, and world.c for what stands in for the kernel.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence

from tools.native import MODULES, load_builder

__all__ = ["CORPUS", "TARGETS", "build", "coverage", "fuzz", "main"]

ROOT = pathlib.Path(__file__).resolve().parents[3]
HERE = pathlib.Path(__file__).resolve().parent
PUMP = ROOT / MODULES["page_pump"]
CORPUS = ROOT / "tests" / "fixtures" / "fuzz"
TARGETS = ("load", "listen", "messages", "multifd")

WRAPPED = ("read", "readv", "write", "writev", "poll", "ioctl", "madvise")
"""The system calls that world.c stands in for."""

FLAGS = ["-std=gnu11", "-g", "-fno-pie", "-Wall", "-Wextra", "-Werror", f"-I{HERE}"]
"""At the same addresses each time: a branch is known by its address."""
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def pump_sources(pump: pathlib.Path = PUMP) -> list[pathlib.Path]:
    """The pump's C files, as its own builder lists them."""
    sources: list[str] = load_builder(PUMP)._assigned_source[3]["sources"]
    return [pump / pathlib.Path(name).name for name in sources]


def build(folder: pathlib.Path, *, count_lines: bool = False, pump: pathlib.Path = PUMP) -> pathlib.Path:
    """Compile the fuzzer into `folder`: with sanitizers, or with gcov's counters instead.

    Objects that are there and newer than their sources stay.
    """
    how = ["-O0"] if count_lines else SANITIZERS
    measured = ["--coverage"] if count_lines else ["-fsanitize-coverage=trace-pc"]
    jobs = [(path, [*how, *measured]) for path in pump_sources(pump)]
    jobs += [(HERE / name, how) for name in ("fuzz.c", "world.c", "targets.c", "packets.c")]
    objects = [str(folder / f"{path.stem}.o") for path, _ in jobs]
    running = [
        subprocess.Popen(["gcc", *FLAGS, f"-I{pump}", *flags, "-c", str(path), "-o", made], cwd=folder)
        for (path, flags), made in zip(jobs, objects, strict=True)
        if not is_newer(made, path)
    ]
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit("the fuzzer does not compile")
    program = folder / "fuzz"
    wraps = "-Wl," + ",".join(f"--wrap={name}" for name in WRAPPED)
    counters = measured if count_lines else []
    link = ["gcc", "-no-pie", *how, *counters, wraps, *objects, "-o", str(program), "-lpthread"]
    subprocess.run(link, check=True)
    return program


def is_newer(made: str, source: pathlib.Path) -> bool:
    """Is there no need to make it again?"""
    path = pathlib.Path(made)
    return path.exists() and path.stat().st_mtime > source.stat().st_mtime


def unpacked(target: str, folder: pathlib.Path) -> pathlib.Path:
    """The corpus of a target as a folder in `folder`."""
    corpus = folder / f"corpus-{target}"
    if not corpus.exists():
        with tarfile.open(CORPUS / f"{target}.tar.xz") as archive:
            archive.extractall(corpus)
    return corpus


def fuzz(
    program: pathlib.Path, target: str, seed: int, seconds: float, keep: pathlib.Path | None = None
) -> str:
    """Run one target and return its line of figures. Raises CalledProcessError if an invariant is broken."""
    corpus = unpacked(target, program.parent)
    command = [str(program), target, str(seed), str(seconds), str(corpus)]
    command += [str(keep)] if keep else []
    done = subprocess.run(
        command, cwd=program.parent, capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    if done.returncode:
        kept = pathlib.Path(tempfile.gettempdir()) / f"last-input-{target}"
        shutil.copy(program.parent / kept.name, kept)
        print(f"{done.stdout}{done.stderr}", file=sys.stderr)
        print(f"again: python -m tests.fuzz.native.run {target} --input {kept}", file=sys.stderr)
        done.check_returncode()
    figures: str = done.stdout.strip()
    return figures


def coverage(folder: pathlib.Path, seed: int, seconds: float) -> list[str]:
    """Which part of each file of the pump is reached, after the corpus and so many seconds of each target."""
    folder.mkdir(exist_ok=True)
    program = build(folder, count_lines=True)
    for target in TARGETS:
        fuzz(program, target, seed, seconds)
    objects = [str(folder / f"{path.stem}.gcda") for path in pump_sources()]
    told = subprocess.run(["gcov", "-n", *objects], cwd=folder, capture_output=True, text=True, check=True)
    found = re.findall(r"File '([^']*)'\nLines executed:([\d.]+)% of (\d+)", told.stdout)
    rows = [(pathlib.Path(name).name, float(part), int(lines)) for name, part, lines in found]
    rows = [row for row in rows if row[0].endswith(".c")]
    reached = sum(part * lines / 100 for _, part, lines in rows)
    total = sum(lines for _, _, lines in rows)
    return [*(f"{name}: {part:.1f} % of {lines} lines" for name, part, lines in sorted(rows)),
            f"all: {100 * reached / total:.1f} % of {total} lines"]  # fmt: skip


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who made it and when: the same inputs are the same archive."""
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _keep(program: pathlib.Path, target: str, seed: int, seconds: float, folder: pathlib.Path) -> str:
    """Fuzz, then make the corpus anew of the shortest inputs that reach all that is reached."""
    found, needed = folder / f"found-{target}", folder / f"needed-{target}"
    found.mkdir()
    needed.mkdir()
    said = fuzz(program, target, seed, seconds, found)
    shutil.copytree(found, unpacked(target, folder), dirs_exist_ok=True)
    fuzz(program, target, seed, 0, needed)
    with tarfile.open(CORPUS / f"{target}.tar.xz", "w:xz") as archive:
        for path in sorted(needed.iterdir()):
            archive.add(path, path.name, filter=_anonymous)
    return f"{said}; the corpus has {len(list(needed.iterdir()))} now"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.native.run", description="Fuzz the page pump in C, with sanitizers."
    )
    parser.add_argument(
        "targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--input", type=pathlib.Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        program = build(folder)
        if options.input:
            return subprocess.run([program, options.targets[0], options.input.resolve()]).returncode
        for target in options.targets or TARGETS:
            run = _keep if options.keep else lambda *given: fuzz(*given[:4])
            print(run(program, target, options.seed, options.seconds, folder), flush=True)
        if options.coverage:
            print(*coverage(folder / "lines", options.seed, options.seconds), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
