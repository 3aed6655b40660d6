"""The bench of the page path: that it runs in a small size, and what it makes of figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.requires import requires
from tools.bench import __main__ as bench
from tools.bench.__main__ import main
from tools.bench.goals import GOALS, Goal, judge
from tools.bench.jobs import JOBS, SMALL, Figures, Size, syncs
from tools.bench.pair import Moved, NotMeasured
from tools.bench.picture import picture_of
from tools.bench.report import table_of
from tools.vm_process import VM

FASTER = Goal("sparse", "total_ms", "sparse: ms", least=5.0)
SHORTER = Goal("sparse", "total_ms", "sparse: ms", most=0.5)
RATE = Goal("sparse", "idle_per_s", "stores: 1/s", least=1.0)
BOUND = Goal("sparse", "total_ms", "sparse: ms", absolute=300.0)

Sides = dict[str, dict[str, list[dict[str, float]]]]


def rounds(figure: str, ours: list[float], stock: list[float]) -> Sides:
    sides = {"pageferry": ours, "stock": stock}
    return {"sparse": {kind: [{figure: value} for value in values] for kind, values in sides.items()}}


@pytest.mark.parametrize(
    ("goal", "ours", "stock", "ratio", "met"),
    [
        (FASTER, [10, 20, 10], [50, 60, 60], 5.0, True),
        (FASTER, [10, 20, 20], [50, 60, 60], 3.0, False),
        (SHORTER, [10, 20, 10], [50, 60, 20], 1 / 3, True),
        (SHORTER, [30, 40, 12], [50, 60, 20], 0.6, False),
        (BOUND, [299, 100, 301], [1, 1, 1], 299.0, True),
        (BOUND, [301, 100, 301], [1, 1, 1], 301.0, False),
    ],
)
def test_a_goal_is_judged_by_the_median_of_the_rounds(
    goal: Goal, ours: list[float], stock: list[float], ratio: float, met: bool
) -> None:
    verdict = judge(rounds("total_ms", ours, stock), goal)
    assert verdict.ratio == pytest.approx(ratio)
    assert verdict.met is met


def test_a_rate_is_better_when_it_is_higher() -> None:
    verdict = judge(rounds("idle_per_s", [20, 30], [10, 15]), RATE)
    assert (verdict.ratio, verdict.met) == (2.0, True)


@pytest.mark.parametrize("goal", [FASTER, SHORTER, RATE, BOUND])
def test_what_was_not_measured_is_neither_met_nor_short(goal: Goal) -> None:
    assert judge({}, goal).met is None


def test_a_figure_without_a_goal_is_shown_and_not_judged() -> None:
    samples = rounds("total_ms", [10, 20], [50, 60])
    shown = Goal("sparse", "total_ms", "sparse: ms")
    assert (judge(samples, shown).met, shown.wanted) == (None, "")
    assert judge(samples, shown).ratio == pytest.approx(0.8 / 3)


@pytest.mark.asyncio
@pytest.mark.parametrize("misses", [0, 2, bench.TRIES])
async def test_a_sample_in_which_it_did_not_happen_does_not_count(
    misses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [NotMeasured("no request")] * misses

    async def job(machine: type[VM], size: Size) -> Figures:
        if left:
            raise left.pop()
        return {"total_ms": 1.0}

    monkeypatch.setitem(JOBS, "sparse", job)
    measured = bench.measure(["sparse"], ["pageferry"], 1, SMALL)
    if misses < bench.TRIES:
        assert await measured == {"sparse": {"pageferry": [{"total_ms": 1.0}]}}
    else:
        with pytest.raises(AssertionError, match="nothing to measure"):
            await measured


def test_a_downtime_that_is_a_clock_reading_is_no_downtime() -> None:
    ram = {"transferred": 1_000_000, "postcopy-requests": 3}
    said = [
        Moved(100.0, 2.0, 90.0, {"downtime": each, "ram": ram}).figures.get("reported_downtime_ms")
        for each in (1, 25_910_000)
    ]
    assert said == [1, None]


def test_every_goal_is_of_a_job() -> None:
    assert {goal.job for goal in GOALS} < JOBS.keys()


def test_the_table_has_a_row_for_each_goal_of_what_was_run() -> None:
    lines = table_of(rounds("total_ms", [10, 20], [50, 90]))
    assert len(lines) == 3
    assert lines[2].split()[-7:] == ["15", "70", "4.75", "(4.50-5.00)", ">=", "5x", "short"]


def test_the_picture_draws_what_there_is() -> None:
    samples = rounds("total_ms", [10, 20], [50, 60])
    samples["growth"] = {kind: [{"untouched_1024_mib_ms": 3.0}] for kind in ("pageferry", "stock")}
    drawn = picture_of(samples, "<today>")
    assert drawn.count("<circle") == 3 + 2
    assert "&lt;today&gt;" in drawn


def test_sync_times_of_both_kinds() -> None:
    stock = "1@10.000100:migration_bitmap_sync_start \n1@10.000350:migration_bitmap_sync_end dirty_pages 3\n"
    assert [pages for pages, _ in syncs(stock * 2)] == [3, 3]
    assert [us for _, us in syncs(stock * 2)] == pytest.approx([250, 250], abs=1)
    assert syncs("pageferry: bitmap sync: 3 pages new, 42 us\n") == [(3, 42.0)]
    assert syncs("nothing of that kind") == []


@pytest.mark.slow
def test_a_small_run_of_all_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requires("uffd")
    output = tmp_path / "pages"
    assert main(["--small", "--rounds", "1", "--without-stock", "--output", str(output)]) == 0
    samples = json.loads(output.with_suffix(".json").read_text())["samples"]
    assert samples.keys() == JOBS.keys()
    assert all(samples[job]["pageferry"][0] for job in JOBS)
    assert "running dirtier" in capsys.readouterr().out
    assert output.with_suffix(".svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_a_small_run_beside_stock(tmp_path: Path) -> None:
    requires("qemu")
    jobs = ["--only", "precopy_unix", "--only", "bitmap_sync"]
    assert main(["--small", "--rounds", "1", *jobs, "--output", str(tmp_path / "pages")]) == 0
    table = (tmp_path / "pages.txt").read_text()
    assert "of a C program" in table
    assert "not measurable" not in table
