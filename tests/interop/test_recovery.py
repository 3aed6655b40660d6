"""A postcopy between Pageferry and stock QEMU whose connection breaks, again and again, and which goes on."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import VM, Pair, Stable, audit
from tests.functional.test_migration_spool import kill_source, send_spool
from tests.interop.peers import Peers, lives_on, same_memory
from tests.support.moves import wait_number
from tests.support.relay import CutAt, Cutter, Relay, at_byte, passes
from tests.support.requires import requires
from vmm.migration import commands

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


async def test_a_spool_completes_a_stock_destination(stable: Stable, tmp_path: pathlib.Path) -> None:
    """Nothing is sent with it that stock does not know."""
    first, source, stock = await sides(stable, True)
    spool = tmp_path / "spool"
    await source.qmp("migrate-set-parameters", x_postcopy_spool_path=str(spool))
    await source.set_capabilities(x_postcopy_spool=True)
    await begin(source, stock, f"unix:{tmp_path / 'wire'}")
    await wait_number(source, "requested-pages")
    said = first.output()  # the guest may have moved in the middle of a line
    await kill_source(Pair(source, stock), spool)
    await send_spool(stock, spool)
    await stock.wait_migration()
    await lives_on(stock, PEERS)
    verdict = audit(said, stock.output())
    assert verdict.is_good, verdict


@contextlib.contextmanager
def cutting_relay(path: pathlib.Path, target: pathlib.Path, *, forward: CutAt = passes) -> Iterator[None]:
    """A wire that ends where `forward` says."""
    cutter = Cutter(forward)
    cutter.relay = relay = Relay(str(path), str(target), cutter)
    try:
        yield
    finally:
        relay.close()


async def test_stock_dies_in_the_package(stable: Stable, tmp_path: pathlib.Path) -> None:
    """Stock has no word for the hand-over, so nobody can know: the guest stays paused until a user says."""
    first, source, stock = await sides(stable, True)
    head = commands.Packaged(b"").encode()[:-4]
    with cutting_relay(tmp_path / "wire", tmp_path / "far", forward=in_the_middle_of(head)):
        await source.qmp("migrate-set-parameters", max_bandwidth=SLOW, downtime_limit=0)
        for machine in (source, stock):
            await machine.set_capabilities(events=True, postcopy_ram=True)
        await stock.qmp("migrate-incoming", uri=f"unix:{tmp_path / 'far'}")
        since = source.mark()
        await source.qmp("migrate", uri=f"unix:{tmp_path / 'wire'}")
        await until_status(source, "active", since)
        await source.qmp("migrate-start-postcopy")
        await until_status(source, "postcopy-paused", since)
    with pytest.raises(ExecuteError, match="may run there"):
        await source.qmp("cont")
    await source.qmp("x-migrate-take-back", destination_is_gone=True)
    await until_status(source, "failed", since)
    await source.qmp("cont")
    await lives_on(source, PEERS)
    verdict = audit(first.output())
    assert verdict.is_good, verdict
    stock.kill()


def in_the_middle_of(head: bytes) -> CutAt:
    return lambda seen: at + len(head) + 100 if (at := seen.find(head)) >= 0 else None


@pytest.mark.parametrize("cut", [0, 1, 8, 17, 18, 21])
async def test_the_handshake_of_a_stock_source_is_cut(
    stable: Stable, tmp_path: pathlib.Path, cut: int
) -> None:
    """Before, in and after RECV_BITMAP, in RESUME: we are paused again, and no page is lost."""
    requires("uffd")
    _, source, destination = await sides(stable, False)
    await begin(source, destination, f"unix:{tmp_path / 'wire'}")
    await break_it(source, destination, partial(source.client.execute, "migrate-pause", oob=True))
    missing = (await destination.qmp("query-migrate"))["x-missing"]["pages"]
    far = tmp_path / "far"
    await destination.client.execute("migrate-recover", {"uri": f"unix:{far}"}, oob=True)
    with cutting_relay(tmp_path / "near", far, forward=at_byte(cut)):
        await source.qmp("migrate", uri=f"unix:{tmp_path / 'near'}", resume=True)
        async with asyncio.timeout(60):
            while (await source.qmp("query-migrate"))["status"] == "postcopy-paused":
                await asyncio.sleep(0.002)
    await destination.wait_migration("postcopy-paused")
    assert (await destination.qmp("query-migrate"))["x-missing"]["pages"] == missing
    assert (await destination.qmp("query-status"))["status"] in ("running", "paused")
