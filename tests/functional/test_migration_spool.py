"""The source is killed in postcopy, and the destination is completed from what its keeper saved."""

from __future__ import annotations

import asyncio
import pathlib
import sys

import pytest

from tests.functional.harness import VM, Pair, Stable, audit
from tests.support.moves import (
    AUDITOR,
    AUDITOR_BANDWIDTH,
    DIRTIER,
    DIRTIER_BANDWIDTH,
    MEMORY_BYTES,
    MEMORY_KINDS,
    auditor_lives,
    limits,
    start_postcopy_early,
    start_postcopy_late,
    wait_number,
    wait_status,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio


async def with_spool(pair: Pair, path: pathlib.Path) -> None:
    await pair.source.qmp("migrate-set-parameters", x_postcopy_spool_path=str(path))
    await pair.set_capabilities(x_postcopy_spool=True, postcopy_ram=True)


async def handed_over(pair: Pair) -> None:
    await pair.destination.wait_event("POSTCOPY_STATE", lambda event: event["data"]["state"] == "running")


async def kill_source(pair: Pair, spool: pathlib.Path) -> None:
    """SIGKILL; the destination notices, and the keeper writes."""
    pair.source.kill()
    await wait_status(pair.destination, "postcopy-paused")
    async with asyncio.timeout(60):
        while not spool.exists():
            await asyncio.sleep(0.005)


async def send_spool(destination: VM, spool: pathlib.Path) -> str:
    """migrate-recover, and the command; what it printed."""
    uri = f"unix:{destination.folder / 'recovery'}"
    await destination.client.execute("migrate-recover", {"uri": uri}, oob=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tools.spool", str(spool), uri, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("kind", MEMORY_KINDS)
async def test_every_page_is_there(stable: Stable, tmp_path: pathlib.Path, kind: str) -> None:
    requires("uffd")
    pair = await stable.pair(*DIRTIER(kind), incoming=("-incoming", "defer", "-S"))
    spool = tmp_path / "spool"
    await with_spool(pair, spool)
    await pair.source.wait_output(lambda text: "AB" in text)
    await start_postcopy_late(pair, DIRTIER_BANDWIDTH)
    await handed_over(pair)
    reference = await pair.source.memory(0, MEMORY_BYTES)
    await kill_source(pair, spool)
    assert "pages were sent" in await send_spool(pair.destination, spool)
    assert not spool.exists()
    await pair.destination.wait_migration()
    assert await pair.destination.memory(0, MEMORY_BYTES) == reference


async def test_a_guest_that_runs_goes_on(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR(), incoming=("-incoming", "defer"))
    spool = tmp_path / "spool"
    await with_spool(pair, spool)
    await auditor_lives(pair.source)
    await start_postcopy_early(pair, AUDITOR_BANDWIDTH)
    await wait_number(pair.source, "requested-pages")
    before = pair.source.output()
    await kill_source(pair, spool)
    await send_spool(pair.destination, spool)
    await pair.destination.wait_migration()
    await auditor_lives(pair.destination, before)
    verdict = audit(before, pair.destination.output())
    assert verdict.is_good, verdict


async def test_a_good_migration_leaves_no_spool_and_no_keeper(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    spool = tmp_path / "spool"
    await with_spool(pair, spool)
    await pair.postcopy()
    children = pathlib.Path(f"/proc/{pair.source.pid}/task/{pair.source.pid}/children").read_text()
    assert not children
    pair.source.kill()
    assert not list(tmp_path.iterdir())


async def test_a_spool_of_another_migration_is_refused(stable: Stable, tmp_path: pathlib.Path) -> None:
    """Its pages are not those of this guest."""
    requires("uffd")
    spools = [tmp_path / "one", tmp_path / "other"]
    pairs = [await stable.pair(*AUDITOR()), await stable.pair(*AUDITOR())]
    for pair, spool in zip(pairs, spools, strict=True):
        await with_spool(pair, spool)
        await auditor_lives(pair.source)
        await start_postcopy_early(pair)
        await handed_over(pair)
        await kill_source(pair, spool)
    with pytest.raises(AssertionError, match="pageferry-spool: "):
        await send_spool(pairs[0].destination, spools[1])
    assert spools[1].exists()
    assert (await pairs[0].destination.qmp("query-migrate"))["status"] == "postcopy-paused"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tools.spool",
        str(spools[0]),
        f"unix:{pairs[0].destination.folder / 'recovery'}",
    )
    assert await process.wait() == 0
    await pairs[0].destination.wait_migration()


async def test_the_capability_needs_a_path(stable: Stable) -> None:
    source = await stable.start("source", *AUDITOR())
    await source.set_capabilities(postcopy_ram=True, x_postcopy_spool=True)
    with pytest.raises(Exception, match="needs the parameter x-postcopy-spool-path"):
        await source.qmp("migrate", uri="unix:/nowhere")
    await limits(source, max_bandwidth=0)
