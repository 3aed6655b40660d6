"""stop, cont, quit and queries while the vCPU waits for a page that cannot come: its source is stopped."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import time
from collections.abc import Awaitable

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import VM, Pair, Stable
from tests.support.moves import (
    AUDITOR,
    auditor_lives,
    check_moved_whole,
    check_running_auditor,
    finish_postcopy,
    limits,
    start_postcopy_early,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio

ANSWER_S = 0.020
"""What the design promises. Measured as the best of some: two cores are shared with everybody."""

QUERIES = (
    "query-status",
    "query-migrate",
    "query-cpus-fast",
    "query-memory-size-summary",
    "query-chardev",
    "query-migrate-parameters",
)


@pytest.fixture(autouse=True)
def _needs_userfaultfd() -> None:
    requires("uffd")


async def took_s(command: Awaitable[object]) -> float:
    began_s = time.perf_counter()
    await command
    return time.perf_counter() - began_s


async def parked_pair(stable: Stable, peer_timeout_ms: int = 0) -> Pair:
    """In postcopy, the source stopped by a signal, the destination's vCPU waiting for one of its pages."""
    pair = await stable.pair(*AUDITOR())
    for machine in (pair.source, pair.destination):
        await limits(machine, x_peer_timeout=peer_timeout_ms)
    await auditor_lives(pair.source)
    await start_postcopy_early(pair)
    await pair.destination.wait_event("POSTCOPY_STATE", lambda event: event["data"]["state"] == "running")
    os.kill(pair.source.pid, signal.SIGSTOP)
    await wait_parked(pair.destination)
    return pair


async def wait_parked(machine: VM) -> str:
    """Until query-status has said twice that the vCPU waits for the same page; the words."""
    async with asyncio.timeout(60):
        last = None
        while True:
            words = (await machine.qmp("query-status")).get("x-vcpu")
            if words is not None and words == last:
                return str(words)
            last = words
            await asyncio.sleep(0.05)


def go_on(machine: VM) -> None:
    os.kill(machine.pid, signal.SIGCONT)


def stops(machine: VM) -> int:
    return [event["event"] for event in machine.events.events].count("STOP")


async def test_everything_answers(stable: Stable, tmp_path: pathlib.Path) -> None:
    """At once, and what cannot be had now is refused."""
    pair = await parked_pair(stable)
    machine = pair.destination
    try:
        for name in QUERIES:
            times = [await took_s(machine.qmp(name)) for _ in range(5)]
            assert min(times) < ANSWER_S, (name, times)
        times = []
        for _ in range(5):
            times.append(await took_s(machine.qmp("stop")))
            assert (await machine.qmp("query-status"))["status"] == "paused"
            times.append(await took_s(machine.qmp("cont")))
            assert (await machine.qmp("query-status"))["status"] == "running"
        assert sorted(times)[len(times) // 2] < ANSWER_S, times
        assert "VM status: running [waiting for page 0x" in await machine.hmp("info status")
        with pytest.raises(ExecuteError, match="Guest is waiting for an incoming migration"):
            await machine.qmp("migrate", uri=f"file:{tmp_path}/state")
        with pytest.raises(ExecuteError, match="have not all been received"):
            await machine.qmp("pmemsave", val=0, size=32 << 20, filename=str(tmp_path / "memory"))
    finally:
        go_on(pair.source)
    await finish_postcopy(pair)
    await check_running_auditor(pair)


async def test_a_stop_is_kept_when_the_page_comes(stable: Stable) -> None:
    """Paused at once, with the reason; STOP once; nothing is heard before cont, and no page differs."""
    pair = await parked_pair(stable)
    source, machine = pair.source, pair.destination
    try:
        before = stops(machine)
        assert await took_s(machine.qmp("stop")) < 10 * ANSWER_S
        shown = await machine.qmp("query-status")
        assert (shown["status"], shown["running"]) == ("paused", False)
        assert shown["x-vcpu"].startswith("waiting for page 0x")
        assert "RAMBlock 'microvm.ram'" in shown["x-vcpu"]
        await machine.qmp("stop")
        assert stops(machine) == before + 1
        heard = machine.output()
    finally:
        go_on(source)
    await finish_postcopy(pair)
    async with asyncio.timeout(60):  # the block is finished, and the vCPU has parked
        while "x-vcpu" in (shown := await machine.qmp("query-status")):
            await asyncio.sleep(0.01)
    assert shown == {"status": "paused", "running": False, "singlestep": False}
    cpu_s = cpu_time_s(machine)
    await asyncio.sleep(0.3)
    assert cpu_time_s(machine) - cpu_s < 0.15, "a stopped guest runs"
    assert machine.output() == heard, "a stopped guest was heard"
    await machine.qmp("cont")
    await check_running_auditor(pair)


def cpu_time_s(machine: VM) -> float:
    fields = pathlib.Path(f"/proc/{machine.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_lost_source_is_not_called_running(stable: Stable) -> None:
    """QEMU says that it runs, for ever. The status stays the one that clients know; the rest is true."""
    pair = await parked_pair(stable, peer_timeout_ms=1000)
    machine = pair.destination
    try:
        await machine.wait_migration("postcopy-paused")
        shown = await machine.qmp("query-status")
        assert (shown["status"], shown["running"]) == ("running", False)
        assert shown["x-vcpu"].endswith("which is at a source that is lost")
        assert "source is silent" in (await machine.qmp("query-migrate"))["error-desc"]
        assert await took_s(machine.qmp("stop")) < 10 * ANSWER_S
        assert (await machine.qmp("query-status"))["status"] == "paused"
        await machine.qmp("cont")
    finally:
        go_on(pair.source)
    await pair.source.wait_migration("postcopy-paused")
    again = pair.uri + "-again"
    await machine.qmp("migrate-recover", uri=again)
    await limits(pair.source, max_postcopy_bandwidth=0)
    await pair.source.qmp("migrate", uri=again, resume=True)
    await pair.finish()
    assert (await machine.qmp("query-status"))["running"] is True
    await check_running_auditor(pair)


async def test_a_stopped_guest_is_the_same_to_the_byte(stable: Stable) -> None:
    """Stopped before it could run: every page is as it was at the source."""
    pair = await stable.pair(*AUDITOR(), incoming=("-incoming", "defer", "-S"))
    await auditor_lives(pair.source)
    await start_postcopy_early(pair)
    os.kill(pair.source.pid, signal.SIGSTOP)
    try:
        for name in ("stop", "query-status", "query-migrate"):
            assert await took_s(pair.destination.qmp(name)) < 10 * ANSWER_S
    finally:
        go_on(pair.source)
    await limits(pair.source, max_postcopy_bandwidth=0)
    await pair.finish()
    await check_moved_whole(pair)


async def test_quit_while_parked(stable: Stable) -> None:
    pair = await parked_pair(stable)
    try:
        assert await took_s(pair.destination.qmp("quit")) < 10 * ANSWER_S
        async with asyncio.timeout(60):
            while pair.destination.exit_code is None:
                await asyncio.sleep(0.01)
        assert pair.destination.exit_code == 0
    finally:
        go_on(pair.source)
