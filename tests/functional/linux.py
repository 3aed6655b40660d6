"""Linux guests for the tests: booted once, saved to a file, and started from there by every test.

A machine whose state came from a file is the guest as it was, at its shell, a third of a second after the
process began; that it is so is a test in itself.
"""

from __future__ import annotations

import asyncio
import pathlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from tests.functional.harness import VM, Stable
from tools.linux_guest import READY, Console, kernel_options

__all__ = ["MACHINE", "Guest", "Saved", "seconds_of_cpu", "ticks_and_results"]

MACHINE = ("-M", "microvm")


@dataclass(frozen=True)
class Saved:
    """A guest that waits at its shell, and the options of the machine it ran on."""

    path: pathlib.Path
    options: list[str]

    @classmethod
    async def boot(cls, folder: pathlib.Path) -> Saved:
        """Boot, and save as soon as the shell is there. Raises ImagesMissing and VmError."""
        options = [*MACHINE, *kernel_options()]
        path = folder / "linux.state"
        async with (
            Console(folder / "console") as console,
            VM("boot", *options, serial=console.option) as machine,
        ):
            await console.wait(READY)
            await machine.qmp("migrate-set-parameters", max_bandwidth=1 << 34)
            await machine.qmp("migrate", uri=f"file:{path}")
            await machine.wait_migration()
        return cls(path, options)


class Guest:
    """A guest and the machine it runs on now; what it said on all of them is `text`."""

    def __init__(self, stable: Stable, saved: Saved, folder: pathlib.Path, *options: str) -> None:
        """Starts from its saved state when it is entered, with `options` more."""
        self._stable = stable
        self._saved = saved
        self._folder = pathlib.Path(tempfile.mkdtemp(dir=folder))
        self._options = options
        self.consoles: list[Console] = []
        self.machine: VM

    @property
    def console(self) -> Console:
        """The one it talks to now."""
        return self.consoles[-1]

    @property
    def text(self) -> str:
        """All that it said since it was started here, wherever it ran."""
        return (
            b"".join(bytes(console.raw) for console in self.consoles).decode("latin-1").replace("\r\n", "\n")
        )

    async def __aenter__(self) -> Guest:
        incoming = ("-incoming", f"file:{self._saved.path}")
        self.machine = await self.another(*incoming, *self._options)
        await self.machine.wait_migration()
        await self.machine.wait_run_state("running")
        return self

    async def __aexit__(self, *error: object) -> None:
        for console in self.consoles:
            await console.__aexit__()

    async def another(self, *options: str) -> VM:
        """One more machine for it, with a console that is the current one from now on."""
        console = await Console(self._folder / f"console{len(self.consoles)}").__aenter__()
        name = f"linux{len(self.consoles)}"
        machine = await self._stable.start(name, *self._saved.options, *options, serial=console.option)
        self.consoles.append(console)
        return machine

    async def wait(self, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until that is so; looked at whenever it has said something."""
        await self.console.wait(lambda _: holds(), timeout_s)

    async def says(self, characters: int) -> None:
        """Wait until it has said so many characters more."""
        begin = len(self.text)
        await self.wait(lambda: len(self.text) >= begin + characters)


def ticks_and_results(text: str) -> tuple[list[int], list[str]]:
    """What `count` and `work` have said: the numbers, and the lines. Everything else is in neither."""
    lines = text.split("\n")
    ticks = [int(line[2:]) for line in lines if re.fullmatch(r"S \d+", line)]
    return ticks, [line for line in lines if line.startswith("T ")]


async def seconds_of_cpu(machine: VM, seconds: float) -> float:
    """How much CPU time the process takes in that time, in seconds."""

    def used_ns() -> int:
        tasks = pathlib.Path(f"/proc/{machine.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    before_ns = used_ns()
    await asyncio.sleep(seconds)
    return (used_ns() - before_ns) / 1e9
