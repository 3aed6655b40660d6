"""Pageferry and stock machines that can take each other's guest, and hops between them.

A guest is booted by Pageferry, since stock's `none` boots nothing. On `none` stock has no serial port:
what the guest says there is lost, so its registers are asked how it fares.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import socket
from dataclasses import dataclass
from typing import Any

from tests.functional.harness import VM, Pair, Stable, StockVM, VmError, guest_options

__all__ = [
    "MEMORY_MIB",
    "MICROVM",
    "SLOW",
    "Peers",
    "Says",
    "StockKvmVM",
    "hop",
    "kvm_missing",
    "lives_on",
    "postcopy_on_demand",
    "receive",
    "same_memory",
    "wait_shown",
]

MIB = 1 << 20
MEMORY_MIB = 16
SLOW = 64 << 10
"""Bytes a second at which nearly nothing is sent unasked; stock takes less than 10 for no limit."""
GUEST = "ratio=2 beat=2 flush=1"
"""flush=1: stock 7.2 under TCG loses writes to pages that stay in its TLB."""

MICROVM = "microvm,acpi=off,pit=off,pic=off,rtc=off,x-option-roms=off"


class StockKvmVM(StockVM):
    """Stock QEMU under KVM."""

    program = ("qemu-system-x86_64", "-accel", "kvm")


def kvm_missing() -> str | None:
    """Why there is no KVM here."""
    return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm cannot be opened"


@dataclass(frozen=True)
class Peers:
    """A machine type and an accelerator of stock: how to start either side."""

    machine: str = "microvm"
    kind: type[VM] = StockVM
    cpu: str = "qemu64"
    """Stock's; with an APIC it sends two more sections."""
    pages: int = 2048
    """The guest's working set, all of it under load, at the end of memory: postcopy pushes that last."""

    @property
    def untouched(self) -> tuple[int, int]:
        """Memory that the guest never touches."""
        return MIB, MEMORY_MIB * MIB - self.pages * 4096

    async def ours(self, stable: Stable, name: str, *options: str) -> VM:
        """A Pageferry with the guest's image."""
        machine = MICROVM if self.machine == "microvm" else "none"
        append = f"{GUEST} start={self.untouched[1]:#x} pages={self.pages}"
        guest = guest_options("auditor", append, f"{MEMORY_MIB}M", machine)
        return await stable.start(name, *guest, *options)

    async def stock(self, stable: Stable, name: str, *options: str) -> VM:
        """A stock QEMU that waits for the guest."""
        machine = MICROVM + ",isa-serial=on" if self.machine == "microvm" else "none"
        cpu = self.cpu if self.machine == "microvm" else "qemu64,-apic,apic-id=0"
        what = ("-M", machine, "-m", f"{MEMORY_MIB}M", "-cpu", cpu, "-incoming", "defer")
        return await stable.start(name, *what, *options, kind=self.kind)


async def wait_shown(machine: VM, name: str, member: str, timeout_s: float = 90.0) -> Any:
    """Until this member of an object of query-migrate is not 0; its value."""
    async with asyncio.timeout(timeout_s):
        while not (shown := await machine.qmp("query-migrate")).get(name, {}).get(member):
            assert shown.get("status") not in ("failed", "completed"), shown
            await asyncio.sleep(0.002)
    return shown[name][member]


async def postcopy_on_demand(pair: Pair, uri: str | None, **capabilities: bool) -> None:
    """One whole postcopy, in which hardly a page is pushed before the guest has asked for one."""
    await pair.source.qmp("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    since = pair.source.mark()
    await pair.begin(uri, postcopy_ram=True, **capabilities)
    await pair.source.wait_event("MIGRATION", lambda event: event["data"]["status"] == "active", since=since)
    await pair.source.qmp("migrate-start-postcopy")
    await wait_shown(pair.source, "ram", "postcopy-requests")
    await pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    await pair.finish()


async def hop(
    source: VM, destination: VM, mode: str, transport: str = "unix", pages: int = Peers.pages
) -> None:
    """One whole migration.

    By `postcopy` so slowly that a guest with so many pages probably asks for some, by `demand` until it has.
    """
    pair = Pair(source, destination)
    uri = None
    if transport == "tcp":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            uri = f"tcp:127.0.0.1:{probe.getsockname()[1]}"
    if mode == "precopy":
        await pair.set_capabilities(postcopy_ram=False)  # as a destination it may have had it
        await source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        await pair.precopy(uri)
    elif mode == "demand":
        await postcopy_on_demand(pair, uri)
    else:
        slow = pages * 4096 * 3 // 2  # bytes a second; nearly nothing is to go before postcopy begins
        limits = {"max_bandwidth": slow // 3, "max_postcopy_bandwidth": slow}
        await source.qmp("migrate-set-parameters", **limits)
        await pair.postcopy(uri)


async def same_memory(one: VM, other: VM, start: int = 0, end: int = MEMORY_MIB * MIB) -> None:
    """Fail unless both, stopped or never writing there, hold the same bytes."""
    differing = await Pair(one, other).differing_pages(end - start, start)
    assert not differing, [hex(address) for address in differing[:20]]


@dataclass(frozen=True)
class Says:
    """What the auditor's registers say: its round and how many errors it has found."""

    rounds: int
    errors: int

    @classmethod
    async def of(cls, machine: VM) -> Says:
        """Ask stock's monitor."""
        text = await machine.hmp("info registers")
        found = dict(re.findall(r"(E[A-Z]{2})=([0-9a-f]{8})", text))
        return cls(int(found["EBP"], 16), int(found["ESI"], 16))


async def lives_on(machine: VM, peers: Peers, rounds: int = 4, timeout_s: float = 60.0) -> None:
    """Wait until the guest has made progress there."""
    if not isinstance(machine, StockVM) or peers.machine == "microvm":
        begin = machine.output().count("\n")
        await machine.wait_output(lambda text: text.count("\n") >= begin + rounds // 2 + 1, timeout_s)
        return
    first = await Says.of(machine)
    try:
        async with asyncio.timeout(timeout_s):
            while (await Says.of(machine)).rounds < first.rounds + rounds:
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise VmError(f"{machine.name}: the guest stands still at {first}") from error


async def receive(path: pathlib.Path) -> bytes:
    """The stream of a source that migrates by precopy to a socket at `path`, there after one turn."""
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done.set_result(await reader.read())
        writer.close()

    async with await asyncio.start_unix_server(serve, str(path)):
        return await done
