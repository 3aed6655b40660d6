"""An unmodified Debian kernel under load moves, and nothing of what it does or says is lost or doubled."""

from __future__ import annotations

import os
import pathlib
import random

import pytest

from tests.functional.harness import Pair, Stable
from tests.functional.linux import Guest, Saved, ticks_and_results

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

HOPS = int(os.environ.get("PAGEFERRY_LINUX_HOPS", "10"))
"""50 on request: PAGEFERRY_LINUX_HOPS=50."""
ROUNDS_PER_HOP = 5


async def hop(guest: Guest, mode: str, *options: str) -> None:
    """Move it to a new machine."""
    source = guest.machine
    destination = await guest.another("-incoming", "defer", *options)
    pair = Pair(source, destination)
    if mode == "precopy":
        await pair.set_capabilities(postcopy_ram=False)
        await source.qmp("migrate-set-parameters", max_bandwidth=1 << 34)
        await pair.precopy()
    else:
        await source.qmp("migrate-set-parameters", max_bandwidth=32 << 20, max_postcopy_bandwidth=0)
        await pair.postcopy()
    guest.machine = destination
    await source.close()


async def test_hops_under_load_at_random_instants(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    rounds = HOPS * ROUNDS_PER_HOP
    chance = random.Random(7)
    async with Guest(stable, saved_linux, tmp_path) as still:
        await still.console.run(f"work {rounds}", 120)
        await still.machine.close()
    async with Guest(stable, saved_linux, tmp_path) as guest:
        guest.console.write(f"count & work {rounds}; kill $!; echo END\n")
        for number in range(HOPS):
            await guest.says(chance.randrange(60 * ROUNDS_PER_HOP))
            await hop(guest, ("precopy", "postcopy")[number % 2])
        assert "END\n" not in guest.text, "it was under load all the time"
        await guest.wait(lambda: "END\n" in guest.text, 120)
    ticks, moved = ticks_and_results(guest.text)
    assert ticks == list(range(1, len(ticks) + 1)), "not a byte of the console is lost or doubled"
    assert len(moved) == rounds
    assert moved == ticks_and_results(still.text)[1]
