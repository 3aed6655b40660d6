"""The page pump in C takes any stream, page request and fault; `PAGEFERRY_FUZZ_S=3600` for so long each."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.fuzz.native.run import CORPUS, PUMP, TARGETS, build, coverage, fuzz

SECONDS = float(os.environ.get("PAGEFERRY_FUZZ_S", "2.5"))
SEED = int(os.environ.get("PAGEFERRY_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_the_pump(program: pathlib.Path, target: str) -> None:
    figures = re.match(r"\w+: (\d+) executions, (\d+) branches", fuzz(program, target, SEED, SECONDS))
    assert figures is not None
    assert int(figures[1]) > 300, "it got nowhere"


REACHED = {"load.c": 75, "place.c": 85, "listen.c": 85, "return_path.c": 85, "multifd.c": 80}
"""Percent of the lines; what is left of load.c is for pages with checksums and for reading ahead."""


@pytest.mark.slow
def test_the_corpus_reaches_the_parsers(tmp_path: pathlib.Path) -> None:
    reached = dict(line.split(": ") for line in coverage(tmp_path, SEED, 0))
    for name, least in REACHED.items():
        assert float(reached[name].split()[0]) >= least, reached


PLANTED = {
    "load": ("load.c", "E_SIZE >= blocks[*block].pages", "E_SIZE > blocks[*block].pages"),
    "listen": ("load.c", "E_SIZE >= blocks[*block].pages", "E_SIZE > blocks[*block].pages"),
    "messages": ("return_path.c", "*length > RP_PAYLOAD_LIMIT", "*length > 2 * RP_PAYLOAD_LIMIT"),
    "multifd": ("multifd.c", "PP_PAGE_SIZE >= pages", "PP_PAGE_SIZE > pages"),
}
"""Target -> file, what stands there, and a mistake that one could make."""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_mistake_is_found(
    program: pathlib.Path, target: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pump, objects = tmp_path / "pump", tmp_path / "objects"
    shutil.copytree(program.parent, objects)
    shutil.copytree(PUMP, pump, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    name, right, wrong = PLANTED[target]
    text = (pump / name).read_text()
    assert right in text, "the source has changed: plant another mistake"
    (pump / name).write_text(text.replace(right, wrong))
    broken = build(objects, pump=pump)
    with pytest.raises(subprocess.CalledProcessError):
        fuzz(broken, target, SEED, 20)
    said = capfd.readouterr().err
    again = re.search(r"again: python -m tests.fuzz.native.run \w+ --input (\S+)", said)
    assert again is not None
    assert subprocess.run([program, target, again[1]], capture_output=True).returncode == 0
    assert subprocess.run([broken, target, again[1]], capture_output=True).returncode != 0


def test_the_corpus_is_kept() -> None:
    assert all((CORPUS / f"{target}.tar.xz").stat().st_size > 1000 for target in TARGETS)
