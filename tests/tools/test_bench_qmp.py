"""The monitor's benchmark: that it runs, and its summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench_qmp import FIGURES, main, summarise


def sample(value: float) -> dict[str, float]:
    return {key: value for key, _, _ in FIGURES}


def test_medians_span_and_ratio() -> None:
    lines = summarise({"pageferry": [sample(30), sample(10), sample(20)], "stock": [sample(80)]})
    assert lines[0].split() == ["median", "(span)", "pageferry", "stock", "ratio"]
    assert lines[2].split()[-4:] == ["20", "(10-30)", "80", "0.25"]
    assert len(lines) == 2 + len(FIGURES)


@pytest.mark.slow
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    assert main(["--rounds", "1", "--scale", "0.02", "--only", "pageferry", "--output", str(output)]) == 0
    (figures,) = json.loads(output.read_text())["samples"]["pageferry"]
    assert figures.keys() == {key for key, _, _ in FIGURES}
    assert all(value > 0 for value in figures.values())
    assert "query-status pipelined" in capsys.readouterr().out
