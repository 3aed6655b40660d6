"""A Debian kernel under load goes from Pageferry to stock QEMU and back, and nothing of it is lost.

It uses the 8259A pair. A stock CPU with a local APIC passes its interrupts on by LINT0, one without by
itself; both are tried. Under KVM nothing is tried here: it depends on the host's.
"""

from __future__ import annotations

import pathlib

import pytest

from tests.functional.harness import VM, Stable, StockVM
from tests.functional.linux import ticks_and_results
from tests.functional.test_linux_moves import LOAD
from tests.interop.peers import hop
from tests.support.requires import requires
from tools.linux_guest import MEMORY_MIB, READY, Console, kernel_options

pytestmark = [pytest.mark.asyncio, pytest.mark.slow, pytest.mark.timeout(240)]

MACHINE = "microvm,acpi=off,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on"
LINES = 6
"""How many lines the guest says on each machine."""


class Journey:
    """A guest, machine after machine."""

    def __init__(self, stable: Stable, folder: pathlib.Path, cpu: str) -> None:
        self._stable = stable
        self._folder = folder
        self._cpu = cpu
        self.consoles: list[Console] = []

    @property
    def text(self) -> str:
        """What it said, on all of them."""
        return (
            b"".join(bytes(console.raw) for console in self.consoles).decode("latin-1").replace("\r\n", "\n")
        )

    async def machine(self, kind: type[VM], *options: str) -> VM:
        """The next one, with a console of its own."""
        number = len(self.consoles)
        console = await Console(self._folder / f"console{number}").__aenter__()
        self.consoles.append(console)
        what = kernel_options() if kind is VM else ["-m", f"{MEMORY_MIB}M"]
        common = ("-M", MACHINE, "-cpu", self._cpu, *what)
        return await self._stable.start(f"m{number}", *common, *options, kind=kind, serial=console.option)

    async def lives_on(self) -> None:
        """Wait until it has said some lines where it is now."""
        await self.consoles[-1].wait(lambda text: text.count("\n") >= LINES, 60)


@pytest.mark.parametrize(
    ("cpu", "modes"),
    [("qemu64", ("precopy", "postcopy", "postcopy", "precopy")), ("qemu64,-apic", ("precopy", "precopy"))],
    ids=["with a local APIC", "without"],
)
async def test_there_and_back(
    stable: Stable, tmp_path: pathlib.Path, cpu: str, modes: tuple[str, ...]
) -> None:
    requires("linux")
    journey = Journey(stable, tmp_path, cpu)
    machine = await journey.machine(VM)
    await journey.consoles[0].wait(READY)
    begin = len(journey.text)
    journey.consoles[0].write(LOAD)
    await journey.lives_on()
    for number, mode in enumerate(modes):
        kind = VM if number % 2 else StockVM
        following = await journey.machine(kind, "-incoming", "defer")
        await hop(machine, following, mode, pages=16384)
        await journey.lives_on()
        await machine.close()
        machine = following
    journey.consoles[-1].write("\n")
    await journey.consoles[-1].wait("END\nDONE 0\n")
    ticks, results = ticks_and_results(journey.text[begin:])
    assert ticks == list(range(1, len(ticks) + 1)), "not a byte of the console is lost or doubled"
    again = await journey.consoles[-1].run(f"work {len(results)}", 120)
    assert ticks_and_results(again)[1] == results
    for console in journey.consoles:
        await console.__aexit__()
