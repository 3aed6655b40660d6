"""The view of a migration: remembers, never runs backwards, says whether it will end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.control.migration_watch import ENDED, MigrationWatch

MIB = 1 << 20


def source(status: str = "active", part: float = 0.5, **figures: Any) -> dict[str, Any]:
    """A reply as a source gives it."""
    ram = {
        "total": 100 * MIB,
        "remaining": figures.pop("remaining", 50 * MIB),
        "mbps": figures.pop("mbps", 80.0),  # 10 MB/s
        "dirty-pages-rate": figures.pop("dirty", 0),
        "page-size": 4096,
        "dirty-sync-count": figures.pop("syncs", 1),
    }
    return {
        "status": status,
        "total-time": figures.pop("time", 100),
        "ram": ram,
        "x-page-map": [part],
        **figures,
    }


def destination(status: str = "active", pages: int = 0, **figures: Any) -> dict[str, Any]:
    """A reply as a destination gives it."""
    return {"status": status, "x-received": {"normal-pages": pages}, "x-page-map": [0.5], **figures}


def watch(*replies: dict[str, Any], is_incoming: bool = False) -> MigrationWatch:
    """A watch that has seen these, a second apart."""
    found = MigrationWatch()
    for second, reply in enumerate(replies):
        found.look(reply, is_incoming, float(second))
    return found


def view(*replies: dict[str, Any], is_incoming: bool = False) -> dict[str, Any]:
    shown = watch(*replies, is_incoming=is_incoming).view()
    assert shown is not None
    return shown


def test_nothing_yet() -> None:
    assert watch({}).view() is None
    assert watch({"socket-address": []}, is_incoming=True).view() is None
    assert not watch({}).is_in_progress


PHASES = {
    "precopy": (["setup", "active", "device", "completed"], "done done done skipped done"),
    "device not seen": (["setup", "active", "completed"], "done done done skipped done"),
    "only the end seen": (["completed"], "done done done skipped done"),
    "postcopy": (["setup", "active", "postcopy-active"], "done done done now next"),
    "paused": (["active", "postcopy-active", "postcopy-paused"], "done done done now next"),
    "recovered": (["active", "postcopy-active", "postcopy-paused", "completed"], "done done done done done"),
    "before switchover": (["active", "pre-switchover"], "done done now next next"),
    "failed": (["setup", "active", "failed"], "done done skipped skipped ended"),
    "cancelled": (["active", "cancelling", "cancelled"], "skipped done skipped skipped ended"),
}


@pytest.mark.parametrize(("statuses", "states"), PHASES.values(), ids=PHASES)
def test_phases(statuses: list[str], states: str) -> None:
    shown = view(
        *({"status": s} if s in ("setup", *(ENDED - {"completed"})) else source(s) for s in statuses)
    )
    assert " ".join(phase["state"] for phase in shown["phases"]) == states
    assert shown["inProgress"] == (statuses[-1] not in ENDED)


def test_a_destination_has_no_switchover() -> None:
    shown = view({"status": "setup"}, destination(), is_incoming=True)
    assert shown["role"] == "destination"
    assert [phase["label"] for phase in shown["phases"]] == ["Set-up", "Precopy", "Postcopy", "Completed"]


def test_figures_outlive_a_failure() -> None:
    shown = view(source(remaining=7 * MIB), {"status": "failed", "error-desc": "Gone"})
    assert (shown["status"], shown["error"]) == ("failed", "Gone")
    assert shown["figures"]["ram"]["remaining"] == 7 * MIB
    assert shown["progress"] == 0.5


@pytest.mark.parametrize(
    "again",
    [{"status": "setup"}, source(time=10), destination()],
    ids=["from its set-up", "seen later", "in the other direction"],
)
def test_the_next_migration_starts_anew(again: dict[str, Any]) -> None:
    found = watch(source(part=0.9), source("completed"))
    assert found.progress == 1
    found.look(again, False, 9.0)
    assert found.progress <= 0.5
    assert found.view()["course"] in ([], [[0.0, found.bandwidth_bytes_per_s, 0.0]])  # type: ignore[index]  # it has begun


def test_a_pass_has_its_own_progress() -> None:
    shown = view(source(remaining=100 * MIB), source(remaining=25 * MIB))
    assert (shown["pass"], shown["passProgress"]) == (1, 0.75)
    shown = view(
        source(remaining=1 * MIB), source(remaining=40 * MIB, syncs=2), source(remaining=30 * MIB, syncs=2)
    )
    assert (shown["pass"], shown["passProgress"]) == (2, 0.25)
    shown = view(source(syncs=2), source("postcopy-active", syncs=2, remaining=60 * MIB))
    assert (shown["pass"], shown["passProgress"]) == (3, 0)


@pytest.mark.parametrize(
    ("replies", "outlook"),
    [
        ([source(mbps=0.0)], "Nothing is measured yet."),
        ([source(remaining=100_000_000)], "The first pass ends in about 10 s."),
        ([source(remaining=90_000_000, syncs=2, dirty=1220)], "Switchover in about 18 s at this rate."),
        ([source(remaining=100_000_000_000, syncs=2)], "Switchover in about 167 min at this rate."),
        ([source(syncs=2, dirty=5000)], "Will not converge at this rate: the guest writes as fast"),
        ([source("postcopy-active", remaining=5_000_000)], "Ends in about a second: in postcopy"),
        ([source("pre-switchover")], "Paused before switchover: migrate-continue goes on."),
        ([source("postcopy-paused")], "The connection was lost."),
        ([source(), source("completed")], "The guest has moved."),
        ([destination("completed")], "The guest is here."),
        ([{"status": "failed"}], "The guest stays at the source."),
        ([{"status": "setup"}], ""),
    ],
)
def test_outlook(replies: list[dict[str, Any]], outlook: str) -> None:
    assert view(*replies)["outlook"].startswith(outlook)


def test_rates() -> None:
    shown = view(source(dirty=100))
    assert (shown["bandwidth"], shown["dirtyRate"]) == (10_000_000, 409_600)
    shown = view(source(dirty=100), source("postcopy-active", dirty=100))
    assert shown["dirtyRate"] == 0, "the guest writes elsewhere"
    shown = view(destination(pages=0), destination(pages=512))
    assert shown["bandwidth"] == 2 * MIB


def test_the_course_is_bounded_and_whole() -> None:
    course = view(*(source(time=number) for number in range(3000)))["course"]
    assert len(course) <= 241
    assert course[0][0] == 0
    assert course[-1][0] > 2950
    assert course == sorted(course)


@given(
    cells=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["active", "device", "postcopy-active", "completed"])),
        max_size=20,
    )
)
def test_progress_never_runs_backwards(cells: list[tuple[float, str]]) -> None:
    found, last = MigrationWatch(), 0.0
    for number, (part, status) in enumerate(cells):
        found.look(source(status, part, time=number), False, float(number))
        assert last <= found.progress <= 1
        assert (found.progress == 1) == (status == "completed") or status == "completed"
        last = found.progress
        if status == "completed":
            break
