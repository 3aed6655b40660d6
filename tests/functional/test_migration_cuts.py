"""Sampled cuts between real processes, by the fault proxy, driven and judged over QMP as users would.

    PAGEFERRY_PROCESS_CUTS=600   so many instead of the gate's
    PAGEFERRY_SEED=7             others

Every record and many more bytes: `tests/vmm/migration/test_cuts.py`, in one process.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import os
import pathlib
import random
import sys
import tempfile
import time
from asyncio.subprocess import PIPE

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import PAGE_BYTES, VM, Stable, StockVM, VmError, guest_options
from tests.support.machine_process import ConsoleFile
from tests.support.moves import AUDITOR, MIB, auditor_lives, check_running_auditor, limits
from tests.support.oracle import DoubleRun, NoRunner, check_one_life
from tests.support.requires import requires
from tools.faultproxy import FaultProxy
from tools.vm_process import ROOT

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

CUTS = int(os.environ.get("PAGEFERRY_PROCESS_CUTS", "60"))
SEED = int(os.environ.get("PAGEFERRY_SEED", "1"))
FLOWS = ("precopy", "postcopy", "recovery")
MEMORY_BYTES = 2 * MIB
RECORDS_START, RECORDS_PAGES = MIB, 64
GUEST = f"start={RECORDS_START:#x} pages={RECORDS_PAGES} beat=4"
SETTLED = ("completed", "failed", "cancelled", "postcopy-paused")
SETTLE_S = 60.0
WRITTEN_LOW = 0x40000, 0x50000
"""Where the guest's own data and stack are."""


class Bed:
    """The pair of the moment: after a cut that the source survived with its guest, both are used again."""

    def __init__(self, stable: Stable, folder: pathlib.Path) -> None:
        self._stable = stable
        self._folder = folder
        self._made = 0
        self._before = b""
        self._ready = False
        self._proxies = 0
        self.source: VM
        self.destination: VM
        self.console: ConsoleFile

    async def _machine(self, name: str, *options: str) -> VM:
        console = f"file,id=console,path={self.console.path},append=on"
        guest = guest_options("auditor", GUEST, memory=f"{MEMORY_BYTES // MIB}M")
        machine = await self._stable.start(
            name, *guest, "-chardev", console, *options, serial="chardev:console"
        )
        await machine.set_capabilities(events=True, postcopy_ram=True, x_page_checksums=True)
        return machine

    async def prepare(self) -> None:
        """Two machines, a guest that lives on the first, and a picture of its memory."""
        if self._ready:
            return
        for machine in (self.destination, self.source) if self._made else ():
            await machine.close()
        self._made += 1
        self.console = ConsoleFile(self._folder / f"console-{self._made}")
        self.source, self.destination = await asyncio.gather(
            self._machine("source"), self._machine("destination", "-incoming", "defer")
        )
        await self.destination.qmp("migrate-incoming", uri=self._uri)
        await self.check_lives()
        self._before = await self.source.memory(0, MEMORY_BYTES)
        self._ready = True

    @property
    def _uri(self) -> str:
        return f"unix:{self.destination.folder}/m"

    # ---- one cut

    async def run(self, flow: str, rule: str) -> str:
        """One migration through a proxy with this rule, and how it came out."""
        await self.prepare()
        first = "first to-server 5000 cut" if flow == "recovery" else rule
        early = flow != "precopy"
        await limits(
            self.source,
            max_bandwidth=1 if early else 0,
            downtime_limit=0 if early else 2000,
            max_postcopy_bandwidth=MIB,
        )
        async with self._proxy(self._uri, first) as proxy:
            await self.source.qmp("migrate", uri=proxy.uri)
            if early:
                await self.source.qmp("migrate-start-postcopy")
            await self._settle()
        await limits(self.source, max_postcopy_bandwidth=0)
        ways = await self._way_back(rule if flow == "recovery" else "")
        outcome = await self._judge()
        return f"{flow}: {outcome}{f' after {ways} recoveries' if ways else ''}"

    def _proxy(self, target: str, rule: str) -> FaultProxy:
        self._proxies += 1
        return FaultProxy(f"unix:{self._folder}/p{self._proxies}", target, rule, SEED)

    async def status(self, machine: VM) -> str:
        """query-migrate's, "none" where it has none."""
        return str((await machine.qmp("query-migrate")).get("status", "none"))

    async def _settle(self) -> None:
        async with asyncio.timeout(SETTLE_S):
            for machine, quiet in ((self.source, ()), (self.destination, ("none",))):
                while await self.status(machine) not in (*SETTLED, *quiet):
                    await asyncio.sleep(0.002)

    async def _way_back(self, rule: str) -> int:
        """Recover until nothing is paused; the first time through a proxy with `rule`."""
        for number in range(5):
            if await self.status(self.source) != "postcopy-paused":
                return number
            door = f"unix:{self.destination.folder}/r{number}"
            await self.destination.qmp("migrate-recover", uri=door)
            async with self._proxy(door, rule) as proxy:
                mark = self.source.mark()
                await self.source.qmp("migrate", uri=proxy.uri, resume=True)
                await self.source.wait_event(
                    "MIGRATION", lambda event: event["data"]["status"] in SETTLED, since=mark
                )
                await self._settle()
            rule = ""
        raise AssertionError("the way back does not work")

    # ---- judgement

    async def running(self) -> list[str]:
        """Who says that it runs the guest; the newer machine is asked first."""
        states = [(m.name, (await m.qmp("query-status"))["running"]) for m in (self.destination, self.source)]
        return [name for name, runs in states if runs]

    async def check_lives(self) -> str:
        """One machine runs the guest, it gets on, and its whole life is one. Raises DoubleRun, NoRunner."""
        runners = await self.running()
        if len(runners) > 1:
            raise DoubleRun(f"{runners} both run")
        if not runners:
            raise NoRunner("nobody says that it runs")
        beats = check_one_life(self.console.text).heartbeats
        end_s = time.monotonic() + SETTLE_S
        while (verdict := check_one_life(self.console.text)).heartbeats < beats + 2:
            if time.monotonic() > end_s:
                raise NoRunner(f"{runners[0]} says that it runs, and the guest is silent")
            await asyncio.sleep(0.001)
        assert verdict.is_good, verdict
        return runners[0]

    async def _judge(self) -> str:
        where = await self.check_lives()
        machine = self.source if where == "source" else self.destination
        status = await self.status(self.source)
        assert status == ("failed" if where == "source" else "completed"), status
        await machine.qmp("stop")
        after = await machine.memory(0, MEMORY_BYTES)
        own = range(RECORDS_START, RECORDS_START + RECORDS_PAGES * PAGE_BYTES)
        for at in range(0, MEMORY_BYTES, PAGE_BYTES):
            same = self._before[at : at + PAGE_BYTES] == after[at : at + PAGE_BYTES]
            assert same or at in own or WRITTEN_LOW[0] <= at < WRITTEN_LOW[1], f"page {at:#x} differs"
        self._ready = where == "source"
        if self._ready:
            await machine.qmp("cont")
        return f"the {where} runs"


async def test_the_example_of_the_tools_page(stable: Stable) -> None:
    """Cut at byte 1,000,000 by the command, then recovered past it: as tools/README.md shows."""
    requires("uffd")
    pair = await stable.pair(*AUDITOR())
    await auditor_lives(pair.source)
    wire = pair.source.folder / "wire"
    command = [sys.executable, "-m", "tools.faultproxy", f"unix:{wire}", pair.uri]
    proxy = await asyncio.create_subprocess_exec(
        *command, "--rule", "first to-server 1000000 cut", cwd=ROOT, stdout=PIPE, stderr=PIPE
    )
    try:
        assert proxy.stdout is not None
        assert await proxy.stdout.readline() == f"listening on unix:{wire}\n".encode()
        await limits(pair.source, max_bandwidth=1, downtime_limit=0)
        await pair.set_capabilities(events=True, postcopy_ram=True)
        await pair.destination.qmp("migrate-incoming", uri=pair.uri)
        await pair.source.qmp("migrate", uri=f"unix:{wire}")
        await pair.source.qmp("migrate-start-postcopy")
        for machine in (pair.source, pair.destination):
            await machine.wait_migration("postcopy-paused")
    finally:
        proxy.terminate()
        _, said = await proxy.communicate()
    assert b"connection 1: to-server 1000000: cut" in said
    again = f"unix:{pair.destination.folder}/again"
    await pair.destination.qmp("migrate-recover", uri=again)
    await pair.source.qmp("migrate", uri=again, resume=True)
    await pair.finish()
    await check_running_auditor(pair)


async def test_stock_qemu_through_the_proxy(stable: Stable, tmp_path: pathlib.Path) -> None:
    """Its first connection is cut in precopy, and its guest goes on."""
    requires("qemu")
    pair = await stable.pair(*guest_options("auditor", "pages=256 beat=64"), kind=StockVM)
    await auditor_lives(pair.source)
    async with FaultProxy(f"unix:{tmp_path}/wire", pair.uri, "first to-server 100000 cut") as proxy:
        await pair.destination.qmp("migrate-incoming", uri=pair.uri)
        await pair.source.qmp("migrate", uri=proxy.uri)
        await pair.source.wait_migration("failed")
        assert proxy.command("status")["ok"][0]["to-server"] == 100_000
    await auditor_lives(pair.source)


def has_beats(enough: int, text: str) -> bool:
    return text.count("H") >= enough


async def test_the_harness_sees_a_guest_that_lives_twice() -> None:
    """A user who takes a guest back that still runs over there: the oracle that watches every pair tells."""
    machines = Stable()
    try:
        pair = await machines.pair(*guest_options("auditor", GUEST))
        await pair.source.wait_output(lambda text: "H" in text)
        await pair.precopy()
        with pytest.raises(ExecuteError, match="may run there"):
            await pair.source.qmp("cont")
        await pair.source.qmp("x-migrate-take-back", destination_is_gone=True)
        await pair.source.qmp("cont")
        for machine in (pair.source, pair.destination):
            enough = machine.output().count("H") + 3
            await machine.wait_output(functools.partial(has_beats, enough))
        with pytest.raises(VmError, match="lived twice"):
            await machines.close()
    finally:
        machines.kill()


def chosen(number: int) -> tuple[str, str]:
    """A flow and a rule; the same for the same seed."""
    chooser = random.Random(f"{SEED}/{number}")
    flow = FLOWS[number % len(FLOWS)]
    if chooser.random() < 0.3:
        return flow, f"first to-client {chooser.randrange(120)} cut"
    longest = {"precopy": 420_000, "postcopy": 330_000, "recovery": 200_000}[flow]
    short = chooser.random() < 0.3  # the handshake is short, and there is much in it
    return flow, f"first to-server {chooser.randrange(300 if short else longest)} cut"


@pytest.mark.timeout(300 + 2 * CUTS)
async def test_cuts_between_processes(stable: Stable) -> None:
    requires("uffd")
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(stable, pathlib.Path(folder))
        for number in range(CUTS):
            flow, rule = chosen(number)
            try:
                outcomes[await bed.run(flow, rule)] += 1
            except Exception as error:
                raise AssertionError(f"seed {SEED}, cut {number}: {flow}, '{rule}'") from error
    print(f"seed {SEED}", *(f"{count:>5}  {what}" for what, count in sorted(outcomes.items())), sep="\n")
    assert len(outcomes) >= 4, outcomes
