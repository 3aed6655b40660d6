"""Small guests for tests: assembler text -> bytes, by binutils, kept in a temporary folder."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile

__all__ = ["assemble"]


def _folder() -> pathlib.Path:
    folder = pathlib.Path(tempfile.gettempdir()) / f"pageferry-guests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def assemble(text: str, origin: int = 0, bits: int = 64) -> bytes:
    """The machine code of AT&T assembler text, linked to run at `origin`; `bits` is 16, 32 or 64.

    Raises AssertionError with the assembler's own words when the text is wrong.
    """
    source = f".code{bits}\n.globl _start\n_start:\n{text}\n"
    key = hashlib.sha256(f"{origin}:{source}".encode()).hexdigest()[:32]
    kept = _folder() / f"{key}.bin"
    if kept.exists():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        base = pathlib.Path(scratch)
        _run(["as", "--64", "-o", str(base / "g.o"), "-"], source)
        link = [
            "ld",
            "-m",
            "elf_x86_64",
            "-N",
            f"-Ttext={origin:#x}",
            "-o",
            str(base / "g.elf"),
            str(base / "g.o"),
        ]
        _run(link)
        _run(["objcopy", "-O", "binary", str(base / "g.elf"), str(base / "g.bin")])
        code = (base / "g.bin").read_bytes()
    staged = kept.with_suffix(f".{os.getpid()}")
    staged.write_bytes(code)
    staged.rename(kept)  # two test processes may do this at once
    return code


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr}"
