"""A guest under load goes from Pageferry to stock QEMU and back, by every way that both have.

Pageferry (boots the guest) -> stock -> Pageferry. The guest checks each page of its working set in every
round and the registers it computes with; what it never touches, and everything when it stands still, is
compared from outside.
"""

from __future__ import annotations

import pytest

from tests.functional.harness import VM, Stable, StockVM, audit
from tests.interop.peers import (
    Peers,
    Says,
    StockKvmVM,
    hop,
    kvm_missing,
    lives_on,
    same_memory,
)

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

CELLS = {
    "none-tcg-unix": (Peers("none"), "unix"),
    "none-tcg-tcp": (Peers("none"), "tcp"),
    "microvm-tcg-unix": (Peers("microvm"), "unix"),
    "microvm-noapic-tcg-tcp": (Peers("microvm", cpu="qemu64,-apic"), "tcp"),
    "none-kvm-tcp": (Peers("none", StockKvmVM, pages=256), "tcp"),
    "microvm-kvm-unix": (Peers("microvm", StockKvmVM, pages=256), "unix"),
}


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest) -> tuple[Peers, str]:
    peers, transport = CELLS[request.param]
    reason = kvm_missing() if peers.kind is StockKvmVM else None
    if reason is not None:
        pytest.skip(reason)
    return peers, transport


async def no_error_found(machine: VM, peers: Peers) -> None:
    """The auditor, which runs on a stock machine without a serial port, has nothing to say."""
    if peers.machine == "none":
        assert (await Says.of(machine)).errors == 0


def assert_good(peers: Peers, first: VM, stock: VM, last: VM) -> None:
    """The guest never complained; on microvm not a byte of what it said is lost or doubled."""
    if peers.machine == "none":  # a line may have been cut by the time at stock, without a serial port
        verdict = audit(first.output().rpartition("\n")[0] + "\n", last.output().partition("\n")[2])
    else:
        verdict = audit(first.output(), stock.output(), last.output())
    assert verdict.is_good, verdict


async def test_precopy(stable: Stable, cell: tuple[Peers, str]) -> None:
    peers, transport = cell
    first = await peers.ours(stable, "first")
    await lives_on(first, peers)

    stock = await peers.stock(stable, "stock", "-S")
    await hop(first, stock, "precopy", transport)
    await same_memory(first, stock)
    await stock.qmp("cont")
    await lives_on(stock, peers)
    await no_error_found(stock, peers)

    last = await peers.ours(stable, "last", "-incoming", "defer", "-S")
    if peers.kind is StockVM:
        await stock.qmp("stop")  # its RAM is no ground truth for what a running guest had
    await hop(stock, last, "precopy", transport)
    await same_memory(stock, last)
    await last.qmp("cont")
    await lives_on(last, peers)
    assert_good(peers, first, stock, last)


async def test_precopy_of_a_running_guest_from_stock(stable: Stable) -> None:
    peers = Peers("microvm")
    first = await peers.ours(stable, "first")
    await lives_on(first, peers)
    stock = await peers.stock(stable, "stock")
    await hop(first, stock, "precopy")
    await lives_on(stock, peers)
    last = await peers.ours(stable, "last", "-incoming", "defer")
    await hop(stock, last, "precopy")
    await lives_on(last, peers)
    assert_good(peers, first, stock, last)


async def test_postcopy_with_demand_paging(stable: Stable, cell: tuple[Peers, str]) -> None:
    peers, transport = cell
    first = await peers.ours(stable, "first")
    await lives_on(first, peers)

    stock = await peers.stock(stable, "stock")
    await hop(first, stock, "demand", transport)
    assert (await first.qmp("query-migrate"))["ram"]["postcopy-requests"] > 0
    await lives_on(stock, peers)
    await no_error_found(stock, peers)
    await same_memory(first, stock, *peers.untouched)

    last = await peers.ours(stable, "last", "-incoming", "defer")
    await hop(stock, last, "demand", transport)
    assert (await last.qmp("query-migrate"))["x-received"]["requests"] > 0
    await lives_on(last, peers)
    await same_memory(stock, last, *peers.untouched)
    assert_good(peers, first, stock, last)


async def test_postcopy_of_a_guest_that_stands_still(stable: Stable) -> None:
    peers = Peers("microvm")
    first = await peers.ours(stable, "first")
    await lives_on(first, peers)
    stock = await peers.stock(stable, "stock", "-S")
    await hop(first, stock, "postcopy")
    await same_memory(first, stock)
    last = await peers.ours(stable, "last", "-incoming", "defer", "-S")
    await hop(stock, last, "postcopy")
    await same_memory(stock, last)
    await last.qmp("cont")
    await lives_on(last, peers)
    assert_good(peers, first, stock, last)
