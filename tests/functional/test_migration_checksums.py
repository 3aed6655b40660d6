"""Pages are damaged on their way between real processes: none is taken, and recovery sends them again."""

from __future__ import annotations

import pathlib

import pytest

from tests.functional.harness import Pair, Stable
from tests.support.moves import (
    AUDITOR,
    auditor_lives,
    check_running_auditor,
    error_of,
    limits,
    start_postcopy_early,
    wait_number,
    wait_status,
)
from tests.support.requires import requires
from tools.faultproxy import FaultProxy

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]


def through(pair: Pair, folder: pathlib.Path, script: str = "") -> FaultProxy:
    return FaultProxy(f"unix:{folder}/wire", pair.uri, script)


async def test_a_damaged_page_ends_a_precopy(stable: Stable, tmp_path: pathlib.Path) -> None:
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    rules = "every to-server 300000 corrupt 0x10"
    async with through(pair, tmp_path, rules) as proxy:
        await pair.set_capabilities(events=True)
        await pair.destination.qmp("migrate-incoming", uri=pair.uri)
        await pair.source.qmp("migrate", uri=proxy.uri)
        text = await error_of(pair.destination)
        await error_of(pair.source)
    assert "Checksum of the page at 0x" in text
    assert "of RAMBlock 'microvm.ram'" in text
    await auditor_lives(pair.source)
    await pair.source.qmp("migrate", uri=pair.uri)
    _, there = await pair.finish()
    assert there["x-page-checksums"]["checked-pages"] >= 8192
    await check_running_auditor(pair)


async def test_a_damaged_page_pauses_a_postcopy(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    async with through(pair, tmp_path) as proxy:
        await limits(pair.source, max_bandwidth=1, downtime_limit=0, max_postcopy_bandwidth=1)
        await pair.set_capabilities(events=True, postcopy_ram=True)
        await pair.destination.qmp("migrate-incoming", uri=pair.uri)
        await pair.source.qmp("migrate", uri=proxy.uri)
        await wait_status(pair.source, "active")
        await pair.source.qmp("migrate-start-postcopy")
        await wait_number(pair.source, "requested-pages")
        (passed,) = proxy.command("status")["ok"]
        rule = f"rule first to-server {passed['to-server'] + 20_000} corrupt"
        assert proxy.command(rule) == {"ok": True}
        await limits(pair.source, max_postcopy_bandwidth=0)
        await pair.destination.wait_migration("postcopy-paused")
        await pair.source.wait_migration("postcopy-paused")
    shown = await pair.destination.qmp("query-migrate")
    assert shown["x-page-checksums"]["state"] is True
    assert shown["x-missing"]["pages"] > 0
    again = f"unix:{pair.destination.folder / 'again'}"
    await pair.destination.client.execute("migrate-recover", {"uri": again}, oob=True)
    await pair.source.qmp("migrate", uri=again, resume=True)
    await pair.finish()
    await check_running_auditor(pair)


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
async def test_without_checksums(stable: Stable, way: str) -> None:
    """As pages go unless they are to be checked: many with one system call, read to their places."""
    if way == "postcopy":
        requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    if way == "precopy":
        await pair.begin(x_page_checksums=False)
    else:
        await start_postcopy_early(pair, x_page_checksums=False)
        await limits(pair.source, max_postcopy_bandwidth=0)
    here, there = await pair.finish()
    assert "x-page-checksums" not in here.keys() | there.keys()
    await check_running_auditor(pair)
