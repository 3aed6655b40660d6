"""A Debian kernel under load goes from Pageferry to stock QEMU and back, and nothing of it is lost.

It uses the 8259A pair. A stock CPU with a local APIC passes its interrupts on by LINT0, one without by
itself; both are tried. Under KVM nothing is tried here: it depends on the host's.

A guest that booted on stock goes the same way. Its CPU has no local APIC: stock's microvm has a firmware that
leaves LINT0 masked, and with `nolapic` nobody else opens it, so no interrupt of an 8259A would come through.
"""

from __future__ import annotations

import pathlib

import pytest

from tests.functional.harness import VM, Stable, StockVM
from tests.functional.linux import ticks_and_results
from tests.functional.test_linux_moves import LOAD
from tests.interop.peers import hop
from tests.support.requires import requires
from tools.linux_guest import APPEND, MEMORY_MIB, READY, Console, kernel_options

pytestmark = [pytest.mark.asyncio, pytest.mark.slow, pytest.mark.timeout(240)]

MACHINE = "microvm,acpi=off,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on"
LINES = 6
"""How many lines the guest says on each machine."""


class Journey:
    """A guest, machine after machine."""

    def __init__(self, stable: Stable, folder: pathlib.Path, cpu: str, append: str = APPEND) -> None:
        self._stable = stable
        self._append = append
        self._folder = folder
        self._cpu = cpu
        self.consoles: list[Console] = []

    @property
    def text(self) -> str:
        """What it said, on all of them."""
        return (
            b"".join(bytes(console.raw) for console in self.consoles).decode("latin-1").replace("\r\n", "\n")
        )

    async def machine(self, kind: type[VM], *options: str, boots_stock: bool = False) -> VM:
        """The next one, with a console of its own; stock waits for a guest unless it `boots_stock`."""
        number = len(self.consoles)
        console = await Console(self._folder / f"console{number}").__aenter__()
        self.consoles.append(console)
        what = kernel_options(append=self._append) if kind is VM or boots_stock else ["-m", f"{MEMORY_MIB}M"]
        machine = MACHINE.replace("x-option-roms=off", "x-option-roms=on") if boots_stock else MACHINE
        common = ("-M", machine, "-cpu", self._cpu, *what)
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
    await travel(journey, await journey.machine(VM), modes, (StockVM, VM))


async def test_a_guest_that_booted_on_stock(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("linux")
    journey = Journey(stable, tmp_path, "qemu64,-apic", APPEND + " noapic nolapic")
    machine = await journey.machine(StockVM, boots_stock=True)
    await travel(journey, machine, ("precopy", "precopy", "postcopy"), (VM, StockVM))


async def travel(journey: Journey, machine: VM, modes: tuple[str, ...], kinds: tuple[type[VM], ...]) -> None:
    """Have the guest work, move it once for each mode, and see that nothing of it was lost."""
    await journey.consoles[0].wait(READY, 60)
    begin = len(journey.text)
    journey.consoles[0].write(LOAD)
    await journey.lives_on()
    for number, mode in enumerate(modes):
        following = await journey.machine(kinds[number % 2], "-incoming", "defer")
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
