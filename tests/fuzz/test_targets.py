"""Each fuzz target for some seconds; `PAGEFERRY_FUZZ_S=3600` for as long as that, each.

With `PAGEFERRY_FUZZ_CORPUS=FOLDER` a run goes on from what earlier ones found.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import subprocess
import sys
from importlib import util

import pytest

from tests.fuzz.run import MAX_BYTES, fuzz_plainly, load, mutated
from tools.vm_process import ROOT

SECONDS = int(os.environ.get("PAGEFERRY_FUZZ_S", "3"))
TARGETS = ["framing", "arguments", "human", "stream", "return_path"]


def fuzz(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.run", *arguments[:2], str(folder), *arguments[2:]]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 60)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 90)
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_the_invariant(target: str, tmp_path: pathlib.Path) -> None:
    done = fuzz(pathlib.Path(os.environ.get("PAGEFERRY_FUZZ_CORPUS", tmp_path)), target, str(SECONDS))
    assert done.returncode == 0, done.stderr[-4000:]
    runs = re.search(r"^Done (\d+) runs", done.stderr, re.MULTILINE)
    assert runs is not None, done.stderr[-2000:]
    assert int(runs[1]) >= 50, "it got nowhere"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--plain",)], ids=["atheris", "plain"])
def test_a_broken_invariant_is_found(options: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    if not options and util.find_spec("atheris") is None:
        options = ("--plain",)
    done = fuzz(tmp_path, "planted", "20", *options)
    assert done.returncode != 0, done.stderr[-2000:]
    assert "too deep" in done.stderr + done.stdout
    [crash] = tmp_path.glob("crash-*")
    with pytest.raises(AssertionError, match="too deep"):
        load("planted").check(crash.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_without_atheris_too(target: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_plainly(target, 0.3, tmp_path)
    assert "Done" in capsys.readouterr().err


def test_mutations_are_of_all_kinds() -> None:
    choices = random.Random(1)
    seeds = [b"abc", b"0123456789" * 300]
    made = [mutated(seeds, [b"TOKEN"], choices) for _ in range(300)]
    assert len(set(made)) > 250
    assert any(b"TOKEN" in data for data in made)
    assert max(map(len, made)) == MAX_BYTES
    assert min(map(len, made)) < 3
