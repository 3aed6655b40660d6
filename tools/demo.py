"""A running guest moves between processes, live: there by precopy, back by postcopy (`make demo`).

    python -m tools.demo             two Pageferry processes at a time
    python -m tools.demo --stock     the same with stock QEMU, to compare

The guest is the auditor: 128 MiB of records that it checks in every round while it rewrites some of them. It
goes from A to B by precopy. B stays paused until all of its RAM was compared with A's, byte for byte. Then
it goes back, to a fresh process A', by postcopy: it runs there while most of its memory is still with B.
Exits 0 if every comparison held and the guest found every page right, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass, field

from tools import guest_builder
from tools.demo_screen import MISSING, Message, Progress, RateMeter, Screen, figure, first_difference, table
from tools.guest_checks import PAGE_BYTES, audit
from tools.vm_process import ENDED, VM, StockVM, VmError

MIB = 1 << 20
RAM_BYTES = 256 * MIB
WORKING_SET_START = 16 * MIB
WORKING_SET_PAGES = 32768
GUEST_IMAGE = (0x40000, 0x50000)
"""The auditor's own code, variables and stack."""
GUEST_OPTIONS = f"start={WORKING_SET_START:#x} pages={WORKING_SET_PAGES} ratio=512 beat=16"

PRECOPY_BYTES_PER_S = 64 * MIB
POSTCOPY_BYTES_PER_S = 48 * MIB
"""Slow enough to watch; `make bench` runs at full speed."""
BEFORE_POSTCOPY_S = 1.0
LOOK_INTERVAL_S = 0.1
DEADLINE_S = 25.0
"""For each of the two moves."""
ROUNDS_AFTER = 3
"""Heartbeats that the guest must give where it arrived: each stands for 16 rounds over all of its pages."""


@dataclass
class Leg:
    """One move, its last figures and what was found out about it."""

    name: str
    source: Message = field(default_factory=dict)
    destination: Message = field(default_factory=dict)
    verdicts: list[tuple[bool, str]] = field(default_factory=list)


class Demo:
    """The scenario; `machine` is the class of VM to use."""

    def __init__(self, screen: Screen, machine: type[VM]) -> None:
        self.screen = screen
        self.machine = machine
        self.outputs: list[str] = []

    def vm(self, name: str, *options: str) -> VM:
        """A machine with the guest, not yet started."""
        kernel = str(guest_builder.build("auditor"))
        memory = ["-M", "microvm", "-m", str(RAM_BYTES // MIB)]
        append = GUEST_OPTIONS + (" flush=1" if self.machine is StockVM else "")  # see auditor.S
        return self.machine(name, *memory, "-kernel", kernel, "-append", append, *options)

    async def run(self) -> bool:
        """The whole demo; True if all was well."""
        began = time.monotonic()
        async with self.vm("A") as first:
            await first.wait_output(lambda text: text.count("H") >= 1)
            self.screen.say(f"A runs the guest (process {first.pid}).", "", "Precopy: A -> B")
            async with self.vm("B", "-incoming", "defer", "-S") as second:
                there = await self.move(first, second, Leg("precopy A -> B"))
                await self.compare_all(first, second, there)
                self.outputs.append(first.output())
                await second.qmp("cont")
                await second.wait_output(lambda text: text.count("H") >= 1)
                await first.close()
                self.screen.say("", "Postcopy: B -> A'")
                async with self.vm("A2", "-incoming", "defer") as third:
                    back = await self.move(second, third, Leg("postcopy B -> A'"), postcopy=True)
                    self.outputs.append(second.output())
                    await third.wait_output(lambda text: text.count("H") >= ROUNDS_AFTER)
                    await third.qmp("stop")
                    self.outputs.append(third.output())
                    await self.compare_quiet_pages(second, third, back)
        self.judge_guest(back)
        return self.report([there, back], time.monotonic() - began)

    async def move(self, source: VM, destination: VM, leg: Leg, *, postcopy: bool = False) -> Leg:
        """Migrate, showing progress; fills and returns `leg`. Raises VmError if it fails."""
        uri = f"unix:{destination.folder / 'migration'}"
        for vm in (source, destination):
            await vm.set_capabilities(events=True, postcopy_ram=postcopy)
        limits = {"max_bandwidth": PRECOPY_BYTES_PER_S, "max_postcopy_bandwidth": POSTCOPY_BYTES_PER_S}
        await source.qmp("migrate-set-parameters", **limits)
        await destination.qmp("migrate-incoming", uri=uri)
        await source.qmp("migrate", uri=uri)
        began = time.monotonic()
        meter = RateMeter()
        switched = not postcopy
        while True:
            leg.source = await source.qmp("query-migrate")
            leg.destination = await destination.qmp("query-migrate")
            now = time.monotonic()
            rate = meter.read(now, leg.source.get("ram", {}).get("transferred", 0))
            status = str(leg.source.get("status", "none"))
            self.screen.show(Progress(status, now - began, rate, leg.source, leg.destination))
            if status in ENDED or status == "postcopy-paused" or now - began > DEADLINE_S:
                break
            if not switched and status == "active" and now - began > BEFORE_POSTCOPY_S:
                await source.qmp("migrate-start-postcopy")
                switched = True
            await asyncio.sleep(LOOK_INTERVAL_S)
        if status != "completed":
            raise VmError(
                f"{leg.name}: {status} after {now - began:.1f} s: {leg.source}\n{source.messages()}"
            )
        await destination.wait_migration()
        leg.destination = await destination.qmp("query-migrate")
        return leg

    async def compare_all(self, source: VM, destination: VM, leg: Leg) -> None:
        """Compare all RAM of two paused machines."""
        there = await source.memory(0, RAM_BYTES)
        here = await destination.memory(0, RAM_BYTES)
        pages, address = first_difference(there, here, PAGE_BYTES)
        if address is None:
            text = f"all {RAM_BYTES // PAGE_BYTES:,} pages compared byte for byte: equal"
        else:
            text = f"{pages:,} pages differ, the first at {address:#x}"
        leg.verdicts.append((address is None, text))

    async def compare_quiet_pages(self, source: VM, destination: VM, leg: Leg) -> None:
        """Compare what the guest, which ran on meanwhile, does not write."""
        working_set_end = WORKING_SET_START + WORKING_SET_PAGES * PAGE_BYTES
        ranges = [(0, GUEST_IMAGE[0]), (GUEST_IMAGE[1], WORKING_SET_START), (working_set_end, RAM_BYTES)]
        for start, end in ranges:
            there = await source.memory(start, end - start)
            here = await destination.memory(start, end - start)
            pages, address = first_difference(there, here, PAGE_BYTES)
            if address is not None:
                leg.verdicts.append((False, f"{pages:,} pages differ, the first at {start + address:#x}"))
                return
        quiet = sum(end - start for start, end in ranges) // PAGE_BYTES
        leg.verdicts.append((True, f"{quiet:,} pages the guest does not write compared byte for byte: equal"))

    def judge_guest(self, leg: Leg) -> None:
        """What the guest itself says about its pages, over all three processes."""
        verdict = audit(*self.outputs)
        if verdict.is_good:
            text = f"the guest checked its {WORKING_SET_PAGES:,} pages {verdict.rounds:,} times: all right"
        else:
            text = f"the guest complains: {verdict}"
        leg.verdicts.append((verdict.is_good, text))

    def latency(self, leg: Leg, quantile: str) -> str:
        """A quantile of the fault latency, '-' where nothing faulted."""
        if not leg.destination.get("x-fault-latency", {}).get("count"):
            return MISSING
        return figure(leg.destination, "x-fault-latency", quantile, unit="us", per=1000)

    def report(self, legs: list[Leg], seconds: float) -> bool:
        """The table and the verdicts; True if all was well."""
        latency = "x-fault-latency"
        rows = [
            ["total time", *(figure(leg.source, "total-time", unit="ms") for leg in legs)],
            ["downtime", *(figure(leg.source, "downtime", unit="ms") for leg in legs)],
            ["passes", *(figure(leg.source, "ram", "dirty-sync-count") for leg in legs)],
            ["pages sent in full", *(figure(leg.source, "ram", "normal") for leg in legs)],
            ["zero pages", *(figure(leg.source, "ram", "duplicate") for leg in legs)],
            ["pages requested", *(figure(leg.source, "ram", "postcopy-requests") for leg in legs)],
            ["pages pushed unasked", *(figure(leg.source, "x-postcopy", "pushed-pages") for leg in legs)],
            ["pages discarded", *(figure(leg.source, "x-postcopy", "discarded-pages") for leg in legs)],
            ["bytes sent", *(figure(leg.source, "ram", "transferred") for leg in legs)],
            ["throughput", *(figure(leg.source, "ram", "mbps", unit="Mbit/s") for leg in legs)],
            ["faults", *(figure(leg.destination, latency, "count") for leg in legs)],
            ["fault latency, median", *(self.latency(leg, "median") for leg in legs)],
            ["fault latency, p99", *(self.latency(leg, "p99") for leg in legs)],
        ]
        self.screen.say("", *table(["", *(leg.name for leg in legs)], rows), "")
        good = True
        for leg in legs:
            for held, text in leg.verdicts:
                self.screen.say(f"{'ok  ' if held else 'FAIL'}  {leg.name.split()[0]}: {text}")
                good &= held
        self.screen.say("", f"{'All well' if good else 'NOT WELL'}, in {seconds:.1f} s.")
        return good


def main(arguments: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stock", action="store_true", help="run stock QEMU 7.2 in place of Pageferry")
    chosen = parser.parse_args(arguments)
    screen = Screen(sys.stdout, live=sys.stdout.isatty())
    try:
        return 0 if asyncio.run(Demo(screen, StockVM if chosen.stock else VM).run()) else 1
    except (VmError, TimeoutError) as error:
        screen.say("", f"Failed: {error}")
        return 1
    except KeyboardInterrupt:
        screen.say("", "Interrupted.")
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
