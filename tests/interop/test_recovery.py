"""A postcopy between Pageferry and stock QEMU whose connection breaks, again and again, and which goes on."""

from __future__ import annotations

import pathlib
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from tests.functional.harness import VM, Pair, Stable, audit
from tests.interop.peers import Peers, lives_on, same_memory
from tests.support.requires import requires

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

PEERS = Peers("microvm")
SLOW = 64 << 10  # bytes a second: of 8 MiB nearly all is still to be sent at each cut
TO_STOCK = pytest.mark.parametrize("to_stock", [True, False], ids=["ours to stock", "stock to ours"])


def became(status: str) -> Callable[[dict[str, object]], bool]:
    return lambda event: event["data"]["status"] == status  # type: ignore[index]  # an event of MIGRATION


async def until_status(machine: VM, status: str, since: int) -> None:
    await machine.wait_event("MIGRATION", became(status), since=since)


async def sides(stable: Stable, to_stock: bool) -> tuple[VM, VM, VM]:
    """Who booted the guest, the source and the destination of the postcopy."""
    first = await PEERS.ours(stable, "first")
    await lives_on(first, PEERS)
    stock = await PEERS.stock(stable, "stock")
    if to_stock:
        return first, first, stock
    await Pair(first, stock).precopy()
    await lives_on(stock, PEERS)
    return first, stock, await PEERS.ours(stable, "last", "-incoming", "defer")


async def begin(source: VM, destination: VM, uri: str) -> None:
    """Postcopy, with nearly everything still at the source; the guest runs at the destination."""
    await source.qmp("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    pair = Pair(source, destination)
    since = source.mark()
    resumed = destination.mark()
    await pair.begin(uri, postcopy_ram=True)
    await until_status(source, "active", since)
    await source.qmp("migrate-start-postcopy")
    await destination.wait_event("RESUME", since=resumed)


async def recover(source: VM, destination: VM, uri: str) -> None:
    marks = source.mark(), destination.mark()
    await destination.client.execute("migrate-recover", {"uri": uri}, oob=True)
    await source.qmp("migrate", uri=uri, resume=True)
    await until_status(source, "postcopy-active", marks[0])
    await until_status(destination, "postcopy-active", marks[1])


async def break_it(source: VM, destination: VM, cut: Callable[[], Awaitable[object]]) -> None:
    marks = source.mark(), destination.mark()
    await cut()
    await until_status(source, "postcopy-paused", marks[0])
    await until_status(destination, "postcopy-paused", marks[1])


async def finish(first: VM, source: VM, destination: VM) -> None:
    """Take the brakes off; everything arrives, and the guest has found no error."""
    await source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    await Pair(source, destination).finish()
    await lives_on(destination, PEERS)
    await same_memory(source, destination, *PEERS.untouched)
    outputs = [machine.output() for machine in dict.fromkeys((first, source, destination))]
    verdict = audit(*outputs)
    assert verdict.is_good, verdict


@TO_STOCK
async def test_cut_and_recover(stable: Stable, tmp_path: pathlib.Path, to_stock: bool) -> None:
    """Four times, by migrate-pause on either side in turn."""
    requires("uffd")
    first, source, destination = await sides(stable, to_stock)
    await begin(source, destination, f"unix:{tmp_path / 'wire'}")
    for number in range(4):
        victim = (source, destination)[number % 2]
        await break_it(source, destination, partial(victim.client.execute, "migrate-pause", oob=True))
        await recover(source, destination, f"unix:{tmp_path / f'wire{number}'}")
    await finish(first, source, destination)
