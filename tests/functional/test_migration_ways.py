"""A guest moves between two processes: precopy; postcopy started at once, late, by the timer, after the end.

Full comparison: the destination was started with -S, so nothing ran there, and every page must be equal.
Running destinations: the dirtier's rule over each page, the auditor's verdict, and equality elsewhere.
"""

from __future__ import annotations

import pytest

from tests.functional.harness import Pair, Stable, check_dirtier, guest_options
from tests.support.moves import (
    AUDITOR,
    DIRTIER,
    DIRTIER_BANDWIDTH,
    MIB,
    auditor_lives,
    check_moved_whole,
    check_running_auditor,
    check_running_dirtier,
    check_was_postcopy,
    finish_postcopy,
    limits,
    push_some,
    stall_in_first_pass,
    start_postcopy_early,
    start_postcopy_late,
    wait_number,
    wait_status,
)
from tests.support.requires import requires
from tools.guest_checks import DIRTIER_END, DIRTIER_START

pytestmark = pytest.mark.asyncio

PAUSED = ("-incoming", "defer", "-S")
RUNNING = ("-incoming", "defer")


async def dirtier_pair(stable: Stable, *, paused: bool) -> Pair:
    pair = await stable.pair(*DIRTIER(), incoming=PAUSED if paused else RUNNING)
    await pair.source.wait_output(lambda text: "AB" in text)
    return pair


def statuses(pair: Pair) -> tuple[list[str], list[str]]:
    """What the MIGRATION events of each side said."""
    source, destination = (
        [event["data"]["status"] for event in machine.events.events if event["event"] == "MIGRATION"]
        for machine in (pair.source, pair.destination)
    )
    return source, destination


def postcopy_states(pair: Pair) -> list[str]:
    events = pair.destination.events.events
    return [event["data"]["state"] for event in events if event["event"] == "POSTCOPY_STATE"]


@pytest.mark.parametrize("paused", [True, False], ids=["paused", "running"])
async def test_precopy(stable: Stable, paused: bool) -> None:
    pair = await dirtier_pair(stable, paused=paused)
    await stall_in_first_pass(pair, DIRTIER_BANDWIDTH)
    await limits(pair.source, max_bandwidth=0, downtime_limit=2000)
    shown, _ = await pair.finish()
    assert statuses(pair) == (["setup", "active", "completed"],) * 2
    assert shown["x-postcopy"]["resent-pages"] > 0, "nothing was written while it was sent"
    assert shown["ram"]["dirty-sync-count"] >= 3
    assert shown["ram"]["postcopy-requests"] == 0
    names = [event["event"] for event in pair.source.events.events]
    assert names.count("STOP") == 1
    await (check_moved_whole(pair) if paused else check_running_dirtier(pair))


async def test_postcopy_by_push_alone(stable: Stable) -> None:
    """Nothing runs at the destination, so nothing is requested."""
    requires("uffd")
    pair = await dirtier_pair(stable, paused=True)
    await start_postcopy_late(pair, DIRTIER_BANDWIDTH)
    await limits(pair.source, max_postcopy_bandwidth=0)
    shown, received = await pair.finish()
    assert statuses(pair) == (["setup", "active", "postcopy-active", "completed"],) * 2
    assert postcopy_states(pair) == ["advise", "discard", "listening", "running", "end"]
    check_was_postcopy(shown, requested=False)
    assert shown["x-postcopy"]["requested-pages"] == 0
    assert received["x-fault-latency"]["count"] == 0
    await check_moved_whole(pair)


async def test_postcopy_by_push_and_by_request(stable: Stable) -> None:
    """The guest is let go when pages were pushed, and the rest comes when pages were requested."""
    requires("uffd")
    pair = await dirtier_pair(stable, paused=True)
    await start_postcopy_early(pair, DIRTIER_BANDWIDTH)
    await push_some(pair)
    await pair.destination.wait_run_state("paused")
    await pair.destination.qmp("cont")
    shown, received = await finish_postcopy(pair)
    assert postcopy_states(pair) == ["advise", "discard", "listening", "running", "end"]
    check_was_postcopy(shown)
    assert received["x-fault-latency"]["count"] > 0
    assert received["x-received"]["requests"] >= shown["x-postcopy"]["requested-pages"]
    await check_running_dirtier(pair)


async def test_postcopy_at_once(stable: Stable) -> None:
    """Before the first byte: the wish is there when mig/source looks for the first time."""
    requires("uffd")
    pair = await dirtier_pair(stable, paused=False)
    await limits(pair.source, max_bandwidth=1, max_postcopy_bandwidth=1)
    await pair.begin(postcopy_ram=True)
    await pair.source.qmp("migrate-start-postcopy")
    shown, _ = await finish_postcopy(pair)
    numbers = shown["x-postcopy"]
    assert shown["ram"]["dirty-sync-count"] <= 3
    assert numbers["requested-pages"] > 0
    assert numbers["pushed-pages"] == numbers["discarded-pages"] - numbers["requested-pages"], (
        "each goes once"
    )
    assert numbers["discarded-pages"] > 32 * MIB // 4096 // 2, "nearly all was still to be sent"
    await check_running_dirtier(pair)


async def test_postcopy_by_the_timer(stable: Stable) -> None:
    requires("uffd")
    pair = await dirtier_pair(stable, paused=False)
    await limits(pair.source, x_postcopy_start_time=1000)
    await stall_in_first_pass(pair, DIRTIER_BANDWIDTH, postcopy=True)
    await wait_status(pair.source, "postcopy-active")
    shown, _ = await finish_postcopy(pair)
    assert statuses(pair)[0] == ["setup", "active", "postcopy-active", "completed"]
    check_was_postcopy(shown, pushed=False)
    assert shown["total-time"] >= 1000
    await check_running_dirtier(pair)


async def test_the_timer_without_the_capability_does_nothing(stable: Stable) -> None:
    pair = await dirtier_pair(stable, paused=True)
    await limits(pair.source, x_postcopy_start_time=1)
    await stall_in_first_pass(pair, DIRTIER_BANDWIDTH)
    assert (await pair.source.qmp("query-migrate"))["status"] == "active"
    await limits(pair.source, max_bandwidth=0, downtime_limit=2000)
    await pair.finish()
    assert statuses(pair)[0] == ["setup", "active", "completed"]
    await check_moved_whole(pair)


async def test_postcopy_started_after_the_end_is_harmless(stable: Stable) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    await pair.begin(postcopy_ram=True)
    shown, _ = await pair.finish()
    assert await pair.source.qmp("migrate-start-postcopy") == {}
    assert await pair.source.qmp("query-migrate") == shown
    assert postcopy_states(pair) == ["advise", "end"]
    await check_running_auditor(pair)


async def test_postcopy_of_the_auditor(stable: Stable) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    await start_postcopy_late(pair)
    shown, _ = await finish_postcopy(pair)
    check_was_postcopy(shown, pushed=False)
    await check_running_auditor(pair)


async def test_cancel_then_a_second_try(stable: Stable) -> None:
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    await limits(pair.source, max_bandwidth=MIB)
    await pair.begin()
    await wait_status(pair.source, "active")
    await pair.source.qmp("migrate_cancel")
    await pair.source.wait_migration("cancelled")
    assert statuses(pair)[0] == ["setup", "active", "cancelling", "cancelled"]
    assert await pair.source.qmp("query-migrate") == {"status": "cancelled"}
    assert (await pair.source.qmp("query-status"))["status"] == "running"
    await auditor_lives(pair.source)
    await pair.destination.wait_event("MIGRATION", lambda event: event["data"]["status"] == "failed")
    assert (await pair.destination.qmp("query-status"))["status"] == "inmigrate"
    await limits(pair.source, max_bandwidth=0)
    await pair.source.qmp("migrate", uri=pair.uri)
    await pair.finish()
    await check_running_auditor(pair)


async def test_there_and_back(stable: Stable) -> None:
    """A destination whose postcopy has ended is a source again, to a process that was never anything else."""
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    await start_postcopy_early(pair)
    await finish_postcopy(pair)
    third = await stable.start("third", *AUDITOR(), "-incoming", "defer")
    back = Pair(pair.destination, third)
    await auditor_lives(back.source, pair.source.output())
    await start_postcopy_early(back)
    shown, _ = await finish_postcopy(back)
    check_was_postcopy(shown, pushed=False)
    await auditor_lives(third, pair.source.output(), back.source.output())


async def test_the_monitor_spellings_of_the_founding_document(stable: Stable) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    for machine in (pair.source, pair.destination):
        assert await machine.hmp("migrate_set_capability x-postcopy-ram on") == ""
        assert "postcopy-ram: on" in await machine.hmp("info migrate_capabilities")
    assert await pair.source.hmp("migrate_set_parameter max-postcopy-bandwidth 1") == ""
    assert await pair.source.hmp("migrate_set_parameter max-bandwidth 1M") == ""
    await pair.destination.qmp("migrate-incoming", uri=pair.uri)
    assert await pair.source.hmp(f"migrate -d {pair.uri}") == ""
    assert await pair.source.hmp("migrate_start_postcopy") == ""
    await wait_number(pair.source, "requested-pages")
    assert "Migration status: postcopy-active" in await pair.source.hmp("info migrate")
    assert "postmigrate" not in await pair.source.hmp("info status")
    assert await pair.source.hmp("migrate_set_parameter max-postcopy-bandwidth 0") == ""
    await pair.finish()
    assert "Migration status: completed" in await pair.source.hmp("info migrate")
    assert "VM status: paused (postmigrate)" in await pair.source.hmp("info status")
    await check_running_auditor(pair)


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
async def test_a_real_mode_boot_sector_moves(stable: Stable, way: str) -> None:
    """QEMU's own kind of guest, with the range and the memory that QEMU's test gives it."""
    guest = guest_options("dirtier_boot", memory="150M")
    pair = await stable.pair(*guest)
    await pair.source.wait_output(lambda text: "AB" in text)
    if way == "postcopy":
        requires("uffd")
        await limits(pair.source, max_bandwidth=1, max_postcopy_bandwidth=1)
        await pair.begin(postcopy_ram=True)
        await pair.source.qmp("migrate-start-postcopy")
        await finish_postcopy(pair)
    else:
        await limits(pair.source, downtime_limit=2000, max_bandwidth=0)
        await pair.precopy()
    await pair.destination.wait_output(lambda text: "BB" in text)
    await pair.destination.qmp("stop")
    check_dirtier(await pair.destination.first_bytes(DIRTIER_START, DIRTIER_END))
