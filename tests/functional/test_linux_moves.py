"""An unmodified Debian kernel under load moves, and nothing of what it does or says is lost or doubled."""

from __future__ import annotations

import os
import pathlib
import random
import time

import pytest

from tests.functional.harness import Pair, Stable
from tests.functional.linux import Guest, Saved, ticks_and_results

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

HOPS = int(os.environ.get("PAGEFERRY_LINUX_HOPS", "10"))
"""50 on request: PAGEFERRY_LINUX_HOPS=50."""
DEADLINE_S = 60 + 12 * HOPS
MOST_BETWEEN_HOPS = 300
"""Characters that the guest says: a second or two."""
LOAD = "count & A=$!; work 100000 & B=$!; read key; kill $A $B; echo END\n"


SLACK_S = 0.1
"""/proc/uptime has hundredths, and downtime is told from the source's side."""


async def hop(guest: Guest, mode: str) -> int:
    """Move it to a new machine; gives the downtime in ms."""
    source = guest.machine
    destination = await guest.another("-incoming", "defer")
    pair = Pair(source, destination)
    if mode == "precopy":
        await pair.set_capabilities(postcopy_ram=False)
        await source.qmp("migrate-set-parameters", max_bandwidth=1 << 34)
        done, _ = await pair.precopy()
    else:
        await source.qmp("migrate-set-parameters", max_bandwidth=32 << 20, max_postcopy_bandwidth=0)
        done, _ = await pair.postcopy()
    guest.machine = destination
    await source.close()
    return int(done["downtime"])


@pytest.mark.timeout(DEADLINE_S)
async def test_hops_under_load_at_random_instants(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    chance = random.Random(7)
    async with Guest(stable, saved_linux, tmp_path) as guest:
        guest.console.write(LOAD)
        for number in range(HOPS):
            await guest.says(chance.randrange(MOST_BETWEEN_HOPS))
            await hop(guest, ("precopy", "postcopy")[number % 2])
        await guest.says(MOST_BETWEEN_HOPS)
        guest.console.write("\n")
        await guest.wait(lambda: "END\n" in guest.text)
    ticks, moved = ticks_and_results(guest.text)
    assert ticks == list(range(1, len(ticks) + 1)), "not a byte of the console is lost or doubled"
    assert len(moved) >= HOPS // 2
    async with Guest(stable, saved_linux, tmp_path) as still:
        await still.console.run(f"work {len(moved)}", DEADLINE_S / 2)
    assert moved == ticks_and_results(still.text)[1]


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
async def test_the_guests_clock_loses_the_downtime_and_no_more(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path, mode: str
) -> None:
    async with Guest(stable, saved_linux, tmp_path) as guest:

        async def clocks() -> tuple[float, float, float]:
            """The guest's, and the host's before and after."""
            before = time.monotonic()
            said = await guest.console.run("read up rest < /proc/uptime; echo $up")
            return float(said), before, time.monotonic()

        begin, _, since = await clocks()
        downtime_ms = await hop(guest, mode)
        end, before, after = await clocks()
    lost_at_least = before - since - (end - begin)
    gained_at_most = end - begin - (after - since)
    assert lost_at_least < downtime_ms / 1000 + SLACK_S
    assert gained_at_most < SLACK_S
