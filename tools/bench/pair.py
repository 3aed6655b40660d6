"""Two VMs of one kind, and a guest's way from one to the other: what every job of the bench is made of.

A cold machine is slow: memory that its host has taken back costs ten times more at its first touch. So what
a migration will touch is touched and given back directly before it. It helps as long as the host does not
take it back at once; a kernel with free page reporting offers it what has been free for two seconds.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools import guest_builder
from tools.vm_process import ROOT, VM

__all__ = [
    "MIB",
    "Moved",
    "NotMeasured",
    "Pair",
    "compiled_limit",
    "open_pair",
    "peak_bytes",
    "wait_status",
    "warm",
]

MIB = 1 << 20
NO_LIMIT_BYTES_PER_S = 100_000_000_000
DOWNTIME_LIMIT_MS = 300
"""QEMU's default."""

DEADLINE_S = 120.0


class NotMeasured(Exception):
    """What was to be measured did not happen this time."""


def compiled_limit() -> pathlib.Path:
    """The C program of `limit.c`, compiled now if it is out of date."""
    source = pathlib.Path(__file__).with_name("limit.c")
    program = ROOT / "build" / "bench" / "limit"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(parents=True, exist_ok=True)
        staged = program.with_suffix(".new")
        command = ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(staged), str(source)]
        subprocess.run(command, check=True)
        staged.rename(program)
    return program


def warm(mib: int) -> None:
    """Touch `mib` MiB and give them back."""
    subprocess.run([str(compiled_limit()), "warm", str(mib)], check=True)


@dataclass(frozen=True)
class Moved:
    """One migration, seen from outside; times in ms."""

    total: float
    """From the `migrate` command to the later `completed` of both sides."""
    downtime: float
    """From the source's STOP to the destination's RESUME, 0 if the guest was paused."""
    after_stop: float
    """From the source's STOP to the end of `total`, 0 if the guest was paused."""
    shown: dict[str, Any]
    """The source's query-migrate."""

    @property
    def figures(self) -> dict[str, float]:
        """What a running guest's migration is judged by; the downtime as the source itself reports it, too.

        That ends in postcopy with the package's last byte; stock's is a reading of its clock if the guest
        had stopped within the millisecond.
        """
        figures: dict[str, float] = {
            "total_ms": self.total,
            "after_stop_ms": self.after_stop,
            "downtime_ms": self.downtime,
            "transferred_mb": self.shown["ram"]["transferred"] / 1e6,
            "requests": self.shown["ram"]["postcopy-requests"],
        }
        reported_ms = self.shown["downtime"]
        return figures if reported_ms > self.total else figures | {"reported_downtime_ms": reported_ms}


@dataclass
class Pair:
    """A source whose guest runs, and a destination that waits."""

    source: VM
    target: VM
    uri: str

    async def prepare(self, *, postcopy: bool = False, **parameters: int) -> None:
        """Set what both sides need and make the destination listen."""
        for vm in (self.source, self.target):
            await vm.set_capabilities(events=True, postcopy_ram=postcopy)
        settings = {"max_bandwidth": NO_LIMIT_BYTES_PER_S, "downtime_limit": DOWNTIME_LIMIT_MS} | parameters
        await self.source.qmp("migrate-set-parameters", **settings)
        await self.target.qmp("migrate-incoming", uri=self.uri)
        if self.uri.startswith("tcp:"):
            (address,) = (await self.target.qmp("query-migrate"))["socket-address"]
            self.uri = f"tcp:{address['host']}:{address['port']}"

    async def begin(self) -> float:
        """Start the migration; the time on the clock of the events, in ms."""
        started_ms = time.time() * 1000
        await self.source.qmp("migrate", uri=self.uri)
        return started_ms

    async def begin_postcopy(self) -> None:
        """Ask for postcopy as soon as the migration is active."""
        await wait_status(self.source, "active")
        await self.source.qmp("migrate-start-postcopy")

    async def finish(self, started_ms: float) -> Moved:
        """Wait for the end on both sides; when it was, their events say, not when we heard of it."""
        ends = [await wait_status(vm, "completed") for vm in (self.target, self.source)]
        ended_ms = max(clock_ms(end) for end in ends)
        stop, resume = self.source.events.find("STOP"), self.target.events.find("RESUME")
        downtime_ms = after_stop_ms = 0.0
        if stop and resume:
            downtime_ms, after_stop_ms = clock_ms(resume) - clock_ms(stop), ended_ms - clock_ms(stop)
        shown = await self.source.qmp("query-migrate")
        return Moved(ended_ms - started_ms, downtime_ms, after_stop_ms, shown)

    async def move(self) -> Moved:
        """All of it, in precopy."""
        await self.prepare()
        return await self.finish(await self.begin())

    async def move_in_postcopy(self, precopy_bytes_per_s: int) -> Moved:
        """All of it: postcopy is asked for once the migration is active, precopy held back until then.

        Raises:
            NotMeasured: it has ended before postcopy began.
        """
        await self.prepare(postcopy=True, max_bandwidth=precopy_bytes_per_s, max_postcopy_bandwidth=0)
        started_ms = await self.begin()
        await self.begin_postcopy()
        moved = await self.finish(started_ms)
        if not moved.shown["ram"]["postcopy-requests"]:
            raise NotMeasured("the migration was over before the guest had to ask for a page")
        return moved


async def wait_status(vm: VM, status: str) -> dict[str, Any]:
    """Wait for the event that says that a migration has come to `status`. Raises VmError."""

    def is_it(event: dict[str, Any]) -> bool:
        return bool(event["data"]["status"] == status)

    return await vm.wait_event("MIGRATION", is_it, timeout_s=DEADLINE_S)


def clock_ms(event: dict[str, Any]) -> float:
    """When an event happened; both processes read the same clock."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] * 1000 + stamp["microseconds"] / 1000)


@contextlib.asynccontextmanager
async def open_pair(
    machine: type[VM],
    guest: str,
    parameters: str,
    ram_mib: int,
    *,
    transport: str = "unix",
    wait_for: str = "B",
    options: Sequence[str] = (),
) -> AsyncIterator[Pair]:
    """Start two machines with `guest`, and wait until it has said `wait_for`."""
    image = str(guest_builder.build(guest))
    words = ["-M", "microvm", "-m", str(ram_mib), "-kernel", image, "-append", parameters, *options]
    async with machine("source", *words) as source, machine("target", *words, "-incoming", "defer") as target:
        await source.wait_output(lambda text: wait_for in text, timeout_s=DEADLINE_S)
        uri = f"unix:{target.folder / 'migration'}" if transport == "unix" else "tcp:127.0.0.1:0"
        yield Pair(source, target, uri)


def peak_bytes(vm: VM) -> int:
    """The most that a process has ever had in memory (VmHWM)."""
    text = pathlib.Path(f"/proc/{vm.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
