"""A guest that writes faster than the connection carries: it is throttled until precopy ends."""

from __future__ import annotations

import asyncio

import pytest

from tests.functional.harness import Message, Pair, Stable, guest_options
from tests.support.moves import (
    DIRTIER_END,
    DIRTIER_START,
    MIB,
    check_running_dirtier,
    limits,
    wait_status,
)

pytestmark = pytest.mark.asyncio

BANDWIDTH = 8 * MIB
SLOW = f"start={DIRTIER_START:#x} end={DIRTIER_END:#x} rounds=1 pause=20000"
"""Some 100 MiB of pages a second, where the connection carries 8."""


async def slow_dirtier(stable: Stable) -> Pair:
    pair = await stable.pair(*guest_options("dirtier", SLOW, memory="32M"))
    await pair.source.wait_output(lambda text: "B" in text)
    await limits(pair.source, max_bandwidth=BANDWIDTH, downtime_limit=50)
    return pair


async def throttled(pair: Pair) -> Message:
    """Until the guest is throttled; what query-migrate shows then."""
    shown: Message = {}
    async with asyncio.timeout(60):
        while "cpu-throttle-percentage" not in shown:
            shown = await pair.source.qmp("query-migrate")
            assert shown["status"] in ("setup", "active"), shown
            await asyncio.sleep(0.01)
    return shown


async def test_a_throttled_guest_converges(stable: Stable) -> None:
    pair = await slow_dirtier(stable)
    await limits(pair.source, cpu_throttle_initial=60, cpu_throttle_increment=39)
    await pair.begin(auto_converge=True)
    assert (await throttled(pair))["x-convergence"]["reason"]
    shown, _ = await pair.finish(timeout_s=90)
    assert shown["downtime"] < 1000
    await check_running_dirtier(pair)


async def test_the_same_guest_does_not_converge_by_itself_and_the_verdict_says_so(stable: Stable) -> None:
    pair = await slow_dirtier(stable)
    await pair.begin()
    async with asyncio.timeout(60):
        while (shown := await pair.source.qmp("query-migrate"))["status"] in ("setup", "active"):
            if shown.get("x-convergence", {}).get("verdict") == "not-converging":
                break
            await asyncio.sleep(0.01)
    assert shown["status"] == "active", shown
    assert "cpu-throttle-percentage" not in shown
    await pair.source.qmp("migrate_cancel")
    await wait_status(pair.source, "cancelled")
