"""Every kind of guest RAM, every rung of the dirty log, root and nobody: precopy and postcopy, exactly."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.functional.harness import NOBODY, Pair, Stable
from tests.support.moves import (
    DIRTIER,
    DIRTIER_BANDWIDTH,
    MEMORY_KINDS,
    check_moved_whole,
    check_running_dirtier,
    check_was_postcopy,
    finish_postcopy,
    limits,
    needs_root,
    push_some,
    stall_in_first_pass,
    start_postcopy_early,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio

WAYS = pytest.mark.parametrize("way", ["precopy", "postcopy"])


async def dirtier_pair(
    stable: Stable, kind: str, *, paused: bool, user: int | None = None, rung: str | None = None
) -> Pair:
    options = DIRTIER(kind, rung)
    source, destination = await asyncio.gather(
        stable.start("source", *options, user=user),
        stable.start("destination", *options, "-incoming", "defer", *(["-S"] if paused else []), user=user),
    )
    await source.wait_output(lambda text: "AB" in text)
    return Pair(source, destination)


async def precopy(pair: Pair, rung: str | None) -> None:
    """Compare all of it; the guest has written much while it was sent."""
    await stall_in_first_pass(pair, DIRTIER_BANDWIDTH)
    await limits(pair.source, max_bandwidth=0, downtime_limit=2000)
    shown, _ = await pair.finish()
    assert shown["x-postcopy"]["resent-pages"] > 0, "nothing was written while it was sent"
    if rung is not None:
        assert shown["x-dirty-log"] == {"rung": rung}
    await check_moved_whole(pair)


async def postcopy(pair: Pair) -> None:
    """To a destination that is paused first, so that pages are pushed, and then runs and requests."""
    await start_postcopy_early(pair, DIRTIER_BANDWIDTH)
    await push_some(pair)
    await pair.destination.wait_run_state("paused")
    await pair.destination.qmp("cont")
    shown, _ = await finish_postcopy(pair)
    check_was_postcopy(shown)
    await check_running_dirtier(pair)


@pytest.mark.parametrize("user", [None, NOBODY], ids=["root", "nobody"])
@pytest.mark.parametrize("kind", MEMORY_KINDS)
@WAYS
async def test_memory_and_user(stable: Stable, way: str, kind: str, user: int | None) -> None:
    if user is not None:
        needs_root()
    if way == "postcopy":
        requires("uffd")
    pair = await dirtier_pair(stable, kind, paused=True, user=user)
    if user is not None:
        assert all(
            os.stat(f"/proc/{machine.pid}").st_uid == NOBODY for machine in (pair.source, pair.destination)
        )
    await (postcopy(pair) if way == "postcopy" else precopy(pair, None))


@pytest.mark.parametrize("rung", ["async", "sync", "engine"])
@WAYS
async def test_each_rung_of_the_dirty_log(stable: Stable, way: str, rung: str) -> None:
    requires("uffd")
    if rung == "async":
        requires("wp_async")
    pair = await dirtier_pair(stable, "anonymous", paused=True, rung=rung)
    await (postcopy(pair) if way == "postcopy" else precopy(pair, rung))
    assert (await pair.source.qmp("query-migrate"))["x-dirty-log"] == {"rung": rung}


@pytest.mark.parametrize("rung", ["sync", "engine"])
@pytest.mark.parametrize("kind", MEMORY_KINDS[1:])
async def test_each_rung_on_memfd(stable: Stable, kind: str, rung: str) -> None:
    requires("uffd")
    pair = await dirtier_pair(stable, kind, paused=True, rung=rung)
    await precopy(pair, rung)
