"""Real processes: what stands between them is killed, or one of them is, after the guest has moved."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sys
from collections.abc import AsyncIterator

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import VM, Pair, Stable, audit
from tests.support.moves import (
    AUDITOR,
    auditor_lives,
    check_running_auditor,
    limits,
    wait_number,
    wait_status,
)
from tests.support.requires import requires
from tools.vm_process import ROOT

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

RELAY = """
import signal, sys
from tests.support.relay import Relay
relay = Relay(sys.argv[1], sys.argv[2])
print("ready", flush=True)
signal.pause()
"""


@contextlib.asynccontextmanager
async def relay_process(
    path: pathlib.Path, target: pathlib.Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Passes on what comes to the socket `path`; SIGKILL is the pulled cable."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RELAY, str(path), str(target), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def in_postcopy(pair: Pair, uri: str | None = None) -> None:
    """The guest runs at the destination, and most of it is still at the source."""
    await auditor_lives(pair.source)
    await limits(pair.source, max_bandwidth=1, downtime_limit=0, max_postcopy_bandwidth=1)
    await pair.set_capabilities(events=True, postcopy_ram=True)
    await pair.destination.qmp("migrate-incoming", uri=pair.uri)
    await pair.source.qmp("migrate", uri=uri or pair.uri)
    await wait_status(pair.source, "active")
    await pair.source.qmp("migrate-start-postcopy")
    await pair.destination.wait_event("RESUME")
    await wait_number(pair.source, "requested-pages")


async def paused(*machines: VM) -> None:
    """By query-migrate: the event may be that of an earlier cut."""
    for machine in machines:
        await machine.wait_migration("postcopy-paused")


async def test_the_wire_is_killed_again_and_again(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    target = pair.destination.folder / "migration"
    async with relay_process(tmp_path / "wire", target) as wire:
        await in_postcopy(pair, f"unix:{tmp_path / 'wire'}")
        wire.kill()
        await paused(pair.source, pair.destination)
    for number in range(3):
        target = pair.destination.folder / f"again{number}"
        await pair.destination.client.execute("migrate-recover", {"uri": f"unix:{target}"}, oob=True)
        through = tmp_path / f"wire{number}"
        async with relay_process(through, target) as wire:
            mark = pair.source.mark(), pair.destination.mark()
            await pair.source.qmp("migrate", uri=f"unix:{through}", resume=True)
            for machine, since in zip((pair.source, pair.destination), mark, strict=True):
                await machine.wait_event(
                    "MIGRATION", lambda event: event["data"]["status"] == "postcopy-active", since=since
                )
            if number == 2:
                await limits(pair.source, max_postcopy_bandwidth=0)
                await pair.finish()
            else:
                wire.kill()
                await paused(pair.source, pair.destination)
    await check_running_auditor(pair)


async def test_by_the_human_monitor(stable: Stable) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await in_postcopy(pair)
    assert await pair.source.hmp("migrate_pause") == ""
    await paused(pair.source, pair.destination)
    again = f"unix:{pair.destination.folder / 'again'}"
    assert await pair.destination.hmp(f"migrate_recover {again}") == ""
    await limits(pair.source, max_postcopy_bandwidth=0)
    assert await pair.source.hmp(f"migrate -d -r {again}") == ""
    await pair.finish()
    await check_running_auditor(pair)


async def test_the_destination_is_killed(stable: Stable) -> None:
    """The guest is lost with it, and the source never runs what it has kept, before a user says so."""
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await in_postcopy(pair)
    source = pair.source
    before = source.output()
    pair.destination.kill()
    await paused(source)
    shown = await source.qmp("query-migrate")
    assert shown["error-desc"]
    assert any("x-migrate-take-back" in step for step in shown["x-next"])
    with pytest.raises(ExecuteError, match="may run there"):
        await source.qmp("cont")
    with pytest.raises(ExecuteError, match="expects true"):
        await source.qmp("x-migrate-take-back", destination_is_gone=False)
    assert source.output() == before
    await source.qmp("x-migrate-take-back", destination_is_gone=True)
    await wait_status(source, "failed")
    await source.qmp("cont")
    await source.wait_output(lambda text: len(text) > len(before))
    assert audit(source.output()).is_good


async def test_the_source_is_killed(stable: Stable) -> None:
    """The destination says what is missing and that somebody waits for it; it can be asked, and ended."""
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await in_postcopy(pair)
    pair.source.kill()
    await paused(pair.destination)
    shown = await pair.destination.qmp("query-migrate")
    assert shown["error-desc"]
    assert shown["x-missing"]["pages"] > 0
    assert any("if the source is gone for good" in step for step in shown["x-next"])
    assert (await pair.destination.qmp("query-version"))["qemu"]["major"] == 7
