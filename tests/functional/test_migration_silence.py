"""A peer that says nothing any more: stopped by a signal. Noticed in time; the outcome is that of a cut."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.functional.harness import VM, Pair, Stable
from tests.support.moves import (
    AUDITOR,
    MIB,
    auditor_lives,
    check_running_auditor,
    error_of,
    limits,
    start_postcopy_early,
    wait_status,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio

TIMEOUT_MS = 1000
NOTICED_S = 4.0
"""Twice the limit, and room for a busy machine."""


@contextmanager
def stopped(machine: VM) -> Iterator[None]:
    """SIGSTOP, and at the end SIGCONT."""
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(machine.pid, signal.SIGCONT)


async def wary_pair(stable: Stable) -> Pair:
    pair = await stable.pair(*AUDITOR())
    for machine in (pair.source, pair.destination):
        await limits(machine, x_peer_timeout=TIMEOUT_MS)
    return pair


async def test_a_silent_destination_fails_precopy(stable: Stable) -> None:
    """Its kernel still takes what it is sent. The guest runs on; after it woke up both can do it again."""
    pair = await wary_pair(stable)
    await auditor_lives(pair.source)
    await limits(pair.source, max_bandwidth=MIB)
    await pair.set_capabilities(events=True)
    await pair.destination.qmp("migrate-incoming", uri="tcp:127.0.0.1:0")
    shown = (await pair.destination.qmp("query-migrate"))["socket-address"][0]
    uri = f"tcp:127.0.0.1:{shown['port']}"
    await pair.source.qmp("migrate", uri=uri)
    await wait_status(pair.source, "active")
    await pair.destination.wait_event("MIGRATION", lambda event: event["data"]["status"] == "active")
    with stopped(pair.destination):
        await pair.source.wait_migration("failed", timeout_s=NOTICED_S)
        assert "destination is silent" in await error_of(pair.source)
        assert (await pair.source.qmp("query-status"))["status"] == "running"
    await pair.destination.wait_event("MIGRATION", lambda event: event["data"]["status"] == "failed")
    await limits(pair.source, max_bandwidth=0)
    await pair.source.qmp("migrate", uri=uri)
    await pair.finish()
    await check_running_auditor(pair)


@pytest.mark.parametrize("who", ["source", "destination"])
async def test_a_silent_peer_pauses_postcopy(stable: Stable, who: str) -> None:
    """Both sides pause, recover, and no page is lost."""
    requires("uffd")
    pair = await wary_pair(stable)
    await auditor_lives(pair.source)
    await start_postcopy_early(pair)
    await pair.destination.wait_event("POSTCOPY_STATE", lambda event: event["data"]["state"] == "running")
    silent, other = (pair.source, pair.destination) if who == "source" else (pair.destination, pair.source)
    with stopped(silent):
        await other.wait_migration("postcopy-paused", timeout_s=NOTICED_S)
        assert f"{who} is silent" in (await other.qmp("query-migrate"))["error-desc"]
    await wait_status(silent, "postcopy-paused")
    again = pair.uri + "-again"
    await pair.destination.qmp("migrate-recover", uri=again)
    await limits(pair.source, max_postcopy_bandwidth=0)
    await pair.source.qmp("migrate", uri=again, resume=True)
    await pair.finish()
    await check_running_auditor(pair)


async def test_who_was_stopped_itself_does_not_blame_the_peer(stable: Stable) -> None:
    """Longer than the limit, but both at once: nobody was silent while the other one listened."""
    pair = await wary_pair(stable)
    await auditor_lives(pair.source)
    await limits(pair.source, max_bandwidth=MIB)
    await pair.begin()
    await wait_status(pair.source, "active")
    with stopped(pair.source), stopped(pair.destination):
        await asyncio.sleep(2 * TIMEOUT_MS / 1000)
    await limits(pair.source, max_bandwidth=0)
    await pair.finish()
    await check_running_auditor(pair)


async def test_before_the_switchover_silence_is_no_silence(stable: Stable) -> None:
    """A source that waits for migrate-continue sends nothing but signs of life, and that is enough."""
    pair = await wary_pair(stable)
    await auditor_lives(pair.source)
    await pair.begin(pause_before_switchover=True)
    await wait_status(pair.source, "pre-switchover")
    await asyncio.sleep(2 * TIMEOUT_MS / 1000)
    assert (await pair.source.qmp("query-migrate"))["status"] == "pre-switchover"
    await pair.source.qmp("migrate-continue", state="pre-switchover")
    await pair.finish()
    await check_running_auditor(pair)
