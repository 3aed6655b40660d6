"""Negative controls: deliberate damage, one kind at a time, is caught by the checks of the other tests."""

from __future__ import annotations

import asyncio

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import VM, Stable, audit
from tests.support.moves import (
    AUDITOR,
    MEMORY_BYTES,
    auditor_lives,
    limits,
    stall_in_first_pass,
    start_postcopy_early,
    wait_status,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio


def damaged(kind: str) -> tuple[str, str]:
    return ("-global", f"migration.x-fault={kind}")


async def test_a_dropped_dirty_bit_is_a_page_that_differs(stable: Stable) -> None:
    pair = await stable.pair(*AUDITOR(), *damaged("drop-dirty"), incoming=("-incoming", "defer", "-S"))
    await auditor_lives(pair.source)
    await stall_in_first_pass(pair)
    await limits(pair.source, max_bandwidth=0, downtime_limit=2000)
    await pair.finish()
    assert len(await pair.differing_pages(MEMORY_BYTES)) == 1


async def test_a_dropped_dirty_bit_is_a_stale_record(stable: Stable) -> None:
    pair = await stable.pair(*AUDITOR(), *damaged("drop-dirty"))
    await auditor_lives(pair.source)
    await stall_in_first_pass(pair)
    await limits(pair.source, max_bandwidth=0, downtime_limit=2000)
    await pair.finish()
    text = await pair.destination.wait_output(lambda text: "STALE" in text or "TORN" in text)
    assert not audit(pair.source.output(), text).is_good


async def test_a_dropped_discard_is_a_page_that_differs(stable: Stable) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR(), *damaged("drop-discard"), incoming=("-incoming", "defer", "-S"))
    await auditor_lives(pair.source)
    await start_postcopy_early(pair, x_page_checksums=False)  # they would notice it
    await limits(pair.source, max_postcopy_bandwidth=0)
    await pair.finish()
    assert len(await pair.differing_pages(MEMORY_BYTES)) == 1


async def test_a_dropped_discard_is_a_stale_record(stable: Stable) -> None:
    requires("uffd")
    pair = await stable.pair(*AUDITOR(), *damaged("drop-discard"))
    await auditor_lives(pair.source)
    await start_postcopy_early(pair, x_page_checksums=False)  # they would notice it
    await limits(pair.source, max_postcopy_bandwidth=0)
    await pair.finish()
    text = await pair.destination.wait_output(lambda text: "STALE" in text or "TORN" in text)
    assert not audit(pair.source.output(), text).is_good


async def test_a_dropped_request_is_a_missing_page_and_stays_one(stable: Stable) -> None:
    """END with a page missing is an error on both sides, and the page does not turn into zeroes."""
    requires("uffd")
    pair = await stable.pair(*AUDITOR(), *damaged("drop-request"))
    await auditor_lives(pair.source)
    await stall_in_first_pass(pair, postcopy=True)
    await limits(pair.source, max_postcopy_bandwidth=1)  # nothing is pushed before the request is there
    await pair.source.qmp("migrate-start-postcopy")
    await wait_request(pair.source)
    await limits(pair.source, max_postcopy_bandwidth=0)
    await wait_status(pair.destination, "postcopy-paused")
    await wait_status(pair.source, "postcopy-paused")
    shown = await pair.destination.qmp("query-migrate")
    assert "pages are missing: 1 of RAMBlock 'microvm.ram'" in shown["error-desc"]
    with pytest.raises(ExecuteError, match="have not all been received"):
        await pair.destination.memory(0, MEMORY_BYTES)
    assert audit(pair.source.output(), pair.destination.output()).complaints == ()
    assert (await pair.source.qmp("query-status"))["running"] is False


async def wait_request(source: VM) -> None:
    """Until the source has been asked for a page."""
    async with asyncio.timeout(60):
        while (await source.qmp("query-migrate"))["ram"]["postcopy-requests"] == 0:
            await asyncio.sleep(0.002)


async def test_a_flipped_byte_is_a_page_that_differs(stable: Stable) -> None:
    pair = await stable.pair(*AUDITOR(), *damaged("flip-byte"), incoming=("-incoming", "defer", "-S"))
    await auditor_lives(pair.source)
    await pair.precopy()
    assert len(await pair.differing_pages(MEMORY_BYTES)) == 1


async def test_a_flipped_byte_is_a_torn_record(stable: Stable) -> None:
    pair = await stable.pair(*AUDITOR(), *damaged("flip-byte"))
    await auditor_lives(pair.source)
    await pair.precopy()
    text = await pair.destination.wait_output(lambda text: "TORN" in text or "STALE" in text)
    assert not audit(pair.source.output(), text).is_good
