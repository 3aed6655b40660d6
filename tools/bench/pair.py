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

__all__ = ["MIB", "Moved", "Pair", "compiled_limit", "open_pair", "peak_bytes", "wait_status", "warm"]

MIB = 1 << 20
NO_LIMIT_BYTES_PER_S = 100_000_000_000
DOWNTIME_LIMIT_MS = 300
"""QEMU's default."""

DEADLINE_S = 120.0


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
    """From the `migrate` command to the destination's `completed`."""
    downtime: float
    """From the source's STOP to the destination's RESUME, 0 if the guest was paused."""
    shown: dict[str, Any]
    """The source's query-migrate."""


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
        """Start the migration; the time on the monotonic clock."""
        started_s = time.monotonic()
        await self.source.qmp("migrate", uri=self.uri)
        return started_s

    async def begin_postcopy(self) -> None:
        """Ask for postcopy as soon as the migration is active."""
        await wait_status(self.source, "active")
        await self.source.qmp("migrate-start-postcopy")

    async def finish(self, started_s: float) -> Moved:
        """Wait for the end on both sides."""
        await wait_status(self.target, "completed")
        total_ms = (time.monotonic() - started_s) * 1000
        await self.source.wait_migration(timeout_s=DEADLINE_S)
        stop, resume = self.source.events.find("STOP"), self.target.events.find("RESUME")
        downtime_ms = clock_ms(resume) - clock_ms(stop) if stop and resume else 0.0
        return Moved(total_ms, downtime_ms, await self.source.qmp("query-migrate"))

    async def move(self, *, postcopy: bool = False, **parameters: int) -> Moved:
        """All of it."""
        await self.prepare(postcopy=postcopy, **parameters)
        started_s = await self.begin()
        if postcopy:
            await self.begin_postcopy()
        return await self.finish(started_s)


async def wait_status(vm: VM, status: str) -> None:
    """Wait for the event that says that a migration has come to `status`. Raises VmError."""
    await vm.wait_event("MIGRATION", lambda event: event["data"]["status"] == status, timeout_s=DEADLINE_S)


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
