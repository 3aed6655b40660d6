"""Capabilities beyond the plain ways, from Pageferry to stock QEMU 7.2 and back; the guest checks itself."""

from __future__ import annotations

import pytest

from tests.functional.harness import VM, Pair, Stable, audit
from tests.interop.peers import Peers, lives_on, postcopy_on_demand, wait_shown
from tests.interop.test_matrix import assert_good

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

MIB = 1 << 20
PEERS = Peers("microvm")


async def precopy_until(source: VM, destination: VM, name: str, member: str, **capabilities: bool) -> None:
    """Precopy that ends no sooner than when the source's query-migrate shows this member."""
    await source.qmp(
        "migrate-set-parameters", max_bandwidth=12 * MIB, downtime_limit=1
    )  # with 0 stock ends after one pass
    pair = Pair(source, destination)
    await pair.begin(None, **capabilities)
    await wait_shown(source, name, member)
    await source.qmp("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=2000)
    await pair.finish()


async def test_xbzrle_both_ways(stable: Stable) -> None:
    first = await PEERS.ours(stable, "first")
    await lives_on(first, PEERS)
    stock = await PEERS.stock(stable, "stock")
    await precopy_until(first, stock, "xbzrle-cache", "pages", xbzrle=True)
    await lives_on(stock, PEERS)

    last = await PEERS.ours(stable, "last", "-incoming", "defer")
    await precopy_until(stock, last, "xbzrle-cache", "pages", xbzrle=True)
    await lives_on(last, PEERS)
    assert_good(PEERS, first, stock, last)


async def postcopy_with(source: VM, destination: VM, **capabilities: bool) -> None:
    await postcopy_on_demand(Pair(source, destination), None, **capabilities)


async def test_postcopy_preempt_both_ways(stable: Stable) -> None:
    first = await PEERS.ours(stable, "first")
    await lives_on(first, PEERS)
    stock = await PEERS.stock(stable, "stock")
    await postcopy_with(first, stock, postcopy_preempt=True)
    await lives_on(stock, PEERS)

    last = await PEERS.ours(stable, "last", "-incoming", "defer")
    await postcopy_with(stock, last, postcopy_preempt=True)
    await lives_on(last, PEERS)
    assert_good(PEERS, first, stock, last)


async def test_release_ram_towards_stock(stable: Stable) -> None:
    """Stock's answers to PING say what it has, too."""
    first = await PEERS.ours(stable, "first")
    await lives_on(first, PEERS)
    await first.set_capabilities(release_ram=True)
    stock = await PEERS.stock(stable, "stock")
    await postcopy_with(first, stock)
    await lives_on(stock, PEERS)
    verdict = audit(first.output(), stock.output())
    assert verdict.is_good, verdict


async def test_blocktime_of_a_guest_from_stock(stable: Stable) -> None:
    first = await PEERS.ours(stable, "first")
    await lives_on(first, PEERS)
    stock = await PEERS.stock(stable, "stock")
    await postcopy_with(first, stock)
    last = await PEERS.ours(stable, "last", "-incoming", "defer")
    await last.set_capabilities(postcopy_blocktime=True)
    await postcopy_with(stock, last)
    shown = await last.qmp("query-migrate")
    assert shown["postcopy-vcpu-latency"][0] > 0
    assert shown["postcopy-vcpu-blocktime"] == [shown["postcopy-blocktime"]]


@pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
async def test_multifd_both_ways(stable: Stable, method: str) -> None:
    async def move(source: VM, destination: VM) -> None:
        for machine in (source, destination):
            await machine.qmp("migrate-set-parameters", multifd_channels=2, multifd_compression=method)
        await source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        pair = Pair(source, destination)
        await pair.begin(None, multifd=True)
        await pair.finish()
        assert (await source.qmp("query-migrate"))["ram"]["multifd-bytes"] > 0

    first = await PEERS.ours(stable, "first")
    await lives_on(first, PEERS)
    stock = await PEERS.stock(stable, "stock")
    await move(first, stock)
    await lives_on(stock, PEERS)
    last = await PEERS.ours(stable, "last", "-incoming", "defer")
    await move(stock, last)
    await lives_on(last, PEERS)
    assert_good(PEERS, first, stock, last)
