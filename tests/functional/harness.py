"""What the functional tests share: machines in processes of their own, in pairs, and checks of their guests.

`VM` is a Pageferry process, `StockVM` a stock QEMU one with the same face (see `tools/vm_process.py`);
`Stable` starts them and sees to it that none is left, that none ended with a traceback, and that no guest of
a pair has lived twice (`tests/support/oracle.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tests.support.oracle import DoubleRun, check_one_life
from tools import guest_builder
from tools.guest_checks import PAGE_BYTES, Verdict, audit, check_dirtier, dirtier_first_bytes
from tools.vm_process import NOBODY, VM, Message, StockVM, VmError

__all__ = [
    "NOBODY",
    "PAGE_BYTES",
    "VM",
    "Message",
    "Pair",
    "Stable",
    "StockVM",
    "Verdict",
    "VmError",
    "audit",
    "check_dirtier",
    "dirtier_first_bytes",
    "guest_options",
]

ALARMS = (
    "Traceback (most recent call last)",
    "Exception ignored",
    "From cffi callback",
    "Fatal Python error",
)
"""What no VM process may ever write, whatever is done to it."""


def guest_options(guest: str, append: str = "", memory: str = "64M", machine: str = "microvm") -> list[str]:
    """Command line options that boot a guest of `tools/guests/` by its name."""
    image = guest_builder.build(guest)
    if image.suffix == ".img":
        return ["-M", machine, "-m", memory, "-drive", f"file={image},format=raw"]
    return ["-M", machine, "-m", memory, "-kernel", str(image), *(["-append", append] if append else [])]


class Stable:
    """Starts machines; at the end of its context all are closed, the last first, or killed."""

    def __init__(self) -> None:
        self._machines: list[VM] = []
        self._pairs: list[Pair] = []

    async def __aenter__(self) -> Stable:
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            await self.close()
        finally:
            self.kill()

    async def start(
        self,
        name: str,
        *options: str,
        kind: type[VM] = VM,
        user: int | None = None,
        serial: str = "file",
        environment: dict[str, str] | None = None,
    ) -> VM:
        """Start one machine and return it, connected."""
        machine = kind(name, *options, user=user, serial=serial)
        self._machines.append(machine)
        await machine.start(environment)
        return machine

    async def pair(self, *options: str, incoming: Iterable[str] = ("-incoming", "defer"), **how: Any) -> Pair:
        """Start a source and a destination with the same options and return them."""
        source = await self.start("source", *options, **how)
        pair = Pair(source, await self.start("destination", *options, *incoming, **how))
        self._pairs.append(pair)
        return pair

    def _double_runs(self) -> Iterator[str]:
        """Pairs whose guest was on both sides at once: a part of its life was told twice."""
        for pair in self._pairs:
            try:
                check_one_life(pair.source.output(), pair.destination.output())
            except DoubleRun as error:
                yield str(error)

    async def close(self) -> None:
        """Close all. Raises VmError, after that, if one hung, wrote a traceback, or a guest lived twice."""
        problems = list(self._double_runs())
        for machine in reversed(self._machines):
            try:
                await machine.close()
            except VmError as error:
                problems.append(str(error))
            if any(alarm in machine.last_words for alarm in ALARMS):
                problems.append(f"{machine.name} wrote:\n{machine.last_words}")
        if problems:
            raise VmError("\n".join(problems))

    def kill(self) -> None:
        """End whatever still runs; for the time after a failed `close`."""
        for machine in self._machines:
            machine.kill()


class Pair:
    """A source and a destination, and the steps of a migration between them."""

    def __init__(self, source: VM, destination: VM) -> None:
        self.source = source
        self.destination = destination

    @property
    def uri(self) -> str:
        """A unix socket in the destination's folder."""
        return f"unix:{self.destination.folder / 'migration'}"

    async def set_capabilities(self, **capabilities: bool) -> None:
        """Set capabilities on both sides; pages are checked unless that is switched off, or is multifd's."""
        checked = {"x_page_checksums": not capabilities.get("multifd")}
        for machine in (self.source, self.destination):
            ours = {} if isinstance(machine, StockVM) else checked
            await machine.set_capabilities(**{**ours, **capabilities})

    async def begin(self, uri: str | None = None, **capabilities: bool) -> None:
        """Set capabilities, have the destination listen and the source start."""
        await self.set_capabilities(events=True, **capabilities)
        await self.destination.qmp("migrate-incoming", uri=uri or self.uri)
        await self.source.qmp("migrate", uri=uri or self.uri)

    async def finish(self, timeout_s: float = 120.0) -> tuple[Message, Message]:
        """Wait until both sides show `completed`; returns what query-migrate shows on each."""
        await self.source.wait_migration(timeout_s=timeout_s)
        await self.destination.wait_migration(timeout_s=timeout_s)
        return await self.source.qmp("query-migrate"), await self.destination.qmp("query-migrate")

    async def precopy(self, uri: str | None = None) -> tuple[Message, Message]:
        """One whole precopy migration."""
        await self.begin(uri)
        return await self.finish()

    async def postcopy(self, uri: str | None = None) -> tuple[Message, Message]:
        """One whole migration that switches to postcopy as soon as it is active."""
        await self.begin(uri, postcopy_ram=True)
        await self.source.wait_event("MIGRATION", lambda event: event["data"]["status"] == "active")
        await self.source.qmp("migrate-start-postcopy")
        return await self.finish()

    async def differing_pages(self, length_bytes: int, start: int = 0) -> list[int]:
        """Addresses of the pages of [start, start + length) that differ between the two, both stopped."""
        one = await self.source.memory(start, length_bytes)
        other = await self.destination.memory(start, length_bytes)
        if one == other:
            return []
        pages = range(0, length_bytes, PAGE_BYTES)
        return [start + at for at in pages if one[at : at + PAGE_BYTES] != other[at : at + PAGE_BYTES]]
