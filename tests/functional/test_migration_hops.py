"""A guest that hops from process to process, each fresh from `-incoming`, unnoticed. And a big guest."""

from __future__ import annotations

import asyncio

import pytest

from tests.functional.harness import VM, Pair, Stable, audit, guest_options
from tests.support.moves import MIB, SOAK, limits, wait_number
from tests.support.requires import requires

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(3600 if SOAK else 110)]

HOPS = 1000 if SOAK else 50
GUEST = guest_options("auditor", "pages=256 ratio=4 beat=16", memory="16M")
LONGMODE = guest_options("longmode", "pages=64 ratio=4 beat=16", memory="36M")


class Traveller:
    """A guest and the machine it is on now; `move` brings it to a fresh process."""

    def __init__(self, stable: Stable, guest: list[str]) -> None:
        self._stable = stable
        self._guest = guest
        self._next: asyncio.Task[VM] | None = None
        self._hop = 0
        self.parts: list[str] = []
        """What it wrote on the machines that it has left."""
        self.machine: VM | None = None

    async def start(self) -> None:
        self.machine = await self._stable.start("origin", *self._guest)

    def _prepare(self) -> asyncio.Task[VM]:
        """The destination after next starts while this hop goes on."""
        self._hop += 1
        return asyncio.create_task(self._stable.start(f"hop-{self._hop}", *self._guest, "-incoming", "defer"))

    async def move(self, *, postcopy: bool, last: bool) -> None:
        """One hop. The machine that was left is closed when its output has been kept."""
        assert self.machine is not None
        pair = Pair(self.machine, await (self._next or self._prepare()))
        self._next = None if last else self._prepare()
        if postcopy:
            # Next to nothing is sent before RUN: the guest asks for what it needs.
            await limits(pair.source, max_bandwidth=1, max_postcopy_bandwidth=1)
            await pair.begin(postcopy_ram=True)
            await pair.source.qmp("migrate-start-postcopy")
            await wait_number(pair.source, "requested-pages")
            await limits(pair.source, max_postcopy_bandwidth=0)
        else:
            await pair.begin(postcopy_ram=False)
        await pair.finish()
        self.parts.append(pair.source.output())
        await pair.source.close()
        self.machine = pair.destination
        # It lives: two heartbeats were told since it was there.
        told = audit(*self.parts).heartbeats
        await self.machine.wait_output(lambda text: audit(*self.parts, text).heartbeats >= told + 2)


@pytest.mark.parametrize(("guest", "hops"), [(GUEST, HOPS), (LONGMODE, 6)], ids=["auditor", "longmode"])
async def test_hops(stable: Stable, guest: list[str], hops: int) -> None:
    requires("uffd")
    traveller = Traveller(stable, guest)
    await traveller.start()
    for hop in range(hops):
        await traveller.move(postcopy=hop % 3 != 0, last=hop == hops - 1)
        verdict = audit(*traveller.parts)
        assert not verdict.complaints, f"hop {hop}: {verdict}"
    assert traveller.machine is not None
    await traveller.machine.qmp("stop")
    verdict = audit(*traveller.parts, traveller.machine.output())
    assert verdict.is_good, verdict
    assert len(traveller.parts) == hops
    assert verdict.heartbeats >= 2 * hops


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
async def test_4_gib_with_64_mib_touched(stable: Stable, way: str) -> None:
    """The time and the memory it takes follow what was touched; RAM goes on beyond the hole below 4 GiB."""
    if way == "postcopy":
        requires("uffd")
    guest = guest_options("auditor", "pages=16384 ratio=64 beat=1", memory="4G")
    source, destination = await asyncio.gather(
        stable.start("source", *guest), stable.start("destination", *guest, "-incoming", "defer", "-S")
    )
    pair = Pair(source, destination)
    await source.wait_output(lambda text: text.count("H") >= 2)
    await limits(source, max_bandwidth=0, downtime_limit=2000, max_postcopy_bandwidth=0)
    shown, _ = await (pair.postcopy() if way == "postcopy" else pair.precopy())
    assert shown["ram"]["total"] == 4 << 30
    assert shown["ram"]["normal"] >= 16384
    assert shown["ram"]["duplicate"] > 900_000
    for machine in (source, destination):
        assert machine.resident_bytes() < 400 * MIB, "pages of zeroes were made real"
    digests = [await machine.qmp("x-query-ram-digest") for machine in (source, destination)]
    assert digests[0] == digests[1]
    before = source.output()
    await destination.qmp("cont")
    told = audit(before).heartbeats
    await destination.wait_output(lambda text: audit(before, text).heartbeats >= told + 2)
    verdict = audit(before, destination.output())
    assert verdict.is_good, verdict
