"""Runs one fuzz target: `python -m tests.fuzz.run TARGET SECONDS [FOLDER]`.

A target is a module here with `check(data)`, which raises if its invariant is broken, SEEDS and TOKENS. With
atheris the inputs are led by coverage; where there is no atheris for this Python (or with `--plain`) they are
mutations of the seeds. What is found is kept in FOLDER, from which a longer run goes on, and so are inputs
that broke an invariant (`crash-...`; the exit status is not 0 then).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import logging
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

TRACED: Final = ["qmp", "vmm.control", "vmm.migration"]
MAX_BYTES: Final = 4096


class Target(Protocol):
    """What a module of this folder has."""

    SEEDS: list[bytes]
    TOKENS: list[bytes]

    def check(self, data: bytes) -> None: ...


def fuzz_by_coverage(name: str, seconds: float, folder: pathlib.Path) -> None:
    """Does not return: libFuzzer ends the process, with status 0 if nothing was found."""
    import atheris

    with atheris.instrument_imports(include=TRACED):
        target = load(name)
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={int(seconds)}", "-timeout=5", f"-max_len={MAX_BYTES}", "-rss_limit_mb=2048"]
    if target.TOKENS:
        tokens = folder / f"{name}.dict"
        lines = ("".join(f"\\x{byte:02x}" for byte in token) for token in target.TOKENS)
        tokens.write_text("".join(f'"{line}"\n' for line in lines))
        options.append(f"-dict={tokens}")
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], target.check)
    atheris.Fuzz()


def fuzz_plainly(name: str, seconds: float, folder: pathlib.Path) -> None:
    """The seeds, and mutations of them for so long; the same ones each time."""
    target = load(name)
    choices = random.Random(name)
    until_s = time.monotonic() + seconds
    runs = 0
    inputs = list(target.SEEDS)
    while runs < len(inputs) or time.monotonic() < until_s:
        data = inputs[runs] if runs < len(inputs) else mutated(inputs, target.TOKENS, choices)
        runs += 1
        try:
            target.check(data)
        except BaseException:
            path = folder / f"crash-{hashlib.sha1(data).hexdigest()}"
            path.write_bytes(data)
            print(f"The invariant is broken by {path}", file=sys.stderr)
            raise
    print(f"Done {runs} runs in {seconds:g} second(s)", file=sys.stderr)


def mutated(seeds: Sequence[bytes], tokens: Sequence[bytes], choices: random.Random) -> bytes:
    """One to eight changes to a seed: bytes, tokens, parts of it and of others."""
    data = bytearray(choices.choice(seeds))
    for _ in range(choices.randint(1, 8)):
        start = choices.randint(0, len(data))
        end = choices.randint(start, len(data))
        other = choices.choice(seeds)
        edits = [
            b"",
            bytes([choices.randrange(256)]),
            bytes(data[start:end]) * 2,
            other[: choices.randint(0, len(other))],
        ]
        if tokens:
            edits += [choices.choice(tokens)] * 2
        data[start:end] = choices.choice(edits)
    return bytes(data[:MAX_BYTES])


def load(name: str) -> Target:
    """The module of a target."""
    module: Any = importlib.import_module(f"tests.fuzz.{name}")
    return cast(Target, module)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.run", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("target")
    parser.add_argument("seconds", type=float)
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    chosen = parser.parse_args()
    folder = chosen.folder or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.ERROR)
    with_atheris = importlib.util.find_spec("atheris") is not None and not chosen.plain
    (fuzz_by_coverage if with_atheris else fuzz_plainly)(chosen.target, chosen.seconds, folder)


if __name__ == "__main__":
    main()
