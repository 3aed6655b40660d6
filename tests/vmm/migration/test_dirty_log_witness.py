"""The engine's rung of the dirty log against the kernel: whole machines, everything that writes to their RAM.

Which instruction stores how is the matter of tests/vmm/cpu/test_store_log.py; here it is guests at work,
devices, resets, and the VMM itself. Compared is in pauses of the guest, synced also while it runs. Pages of
an incoming migration are no part of it: there is no dirty log before they are all here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.support.kernel_witness import KernelWitness, pages_of
from tests.support.real_machines import DEADLINE_S, MIB, PAGE, Side, Sides, until
from tests.support.requires import requires
from tests.support.virtio_driver import Driver
from tools import linux_images
from tools.linux_guest import APPEND
from uffd import take_bits
from vmm.config import DeviceConfig
from vmm.cpu.engine import Engine
from vmm.migration.bitmap import Bitmap
from vmm.migration.dirty_log import CpuLog, open_dirty_log

SYNCS = 20
LINUX_SCRIPT = """
dmesg -n 1
i=0
while true; do
    echo ROUND; i=$((i+1)); seq $((i*9)) $((i*9+3000)) > /tmp/f$((i%4)); cat /tmp/f* | sha256sum | cut -c 1-8
    (echo $i | gzip | gunzip > /dev/null)
done
"""


class Trial:
    """The engine's log and the kernel's over the same RAM."""

    def __init__(self, side: Side, cpu_log: CpuLog | None = None) -> None:
        ram = side.machine.ram
        for block in ram.blocks:
            block.use_huge_pages(False)  # the kernel would call all of a new one written
        self._side = side
        self._logged = {block.name: Bitmap(block.page_count) for block in ram.blocks}
        self.log = open_dirty_log(ram, cpu_log or side.machine.cpu_log, "engine")
        self.witness = KernelWitness({b.name: (b.host_address, b.page_count) for b in ram.blocks})
        self.log.start()
        self.seen = 0

    def sync(self) -> None:
        """While the guest may run."""
        self.log.sync(self._logged)

    def missing(self) -> list[int]:
        """The guest stands still: what has the kernel seen that the log has not, since the last call?"""
        (name,) = self._logged
        written = self.witness.take()[name]
        self.sync()
        self.seen += written.count()
        written.andnot(self._logged[name])
        self._logged[name].fill(False)
        return pages_of(written)

    def run(self, rounds: int = SYNCS, pages: int = 1) -> list[int]:
        """Lets the guest write so many pages, syncing meanwhile, and compares, so many times; what missed."""
        missing = []
        for _ in range(rounds):
            self._side.machine.cont()
            until(lambda: self._written() >= pages, "the guest writes")
            for _ in range(10):
                self.sync()
            self._side.pause()
            missing += self.missing()
        return missing

    def _written(self) -> int:
        self.sync()
        return sum(bitmap.count() for bitmap in self._logged.values())

    def close(self) -> None:
        self.log.stop()
        self.witness.close()


class Forgetful:
    """An engine's log that loses one page in a hundred."""

    def __init__(self, engine: Engine, pages: int) -> None:
        self._engine = engine
        self._taken = Bitmap(pages)
        self.start_log, self.stop_log = engine.start_log, engine.stop_log

    def aim_log(self, targets: Sequence[tuple[int, int, int, int]]) -> Any:
        ((guest, pages, address, first),) = targets
        assert first == 0
        self._into = address
        return self._engine.aim_log([(guest, pages, self._taken.address, first)])

    def collect_log(self, targets: Any) -> int:
        self._engine.collect_log(targets)
        for page in range(7, self._taken.pages, 100):
            self._taken.clear(page)
        return take_bits(self._taken.address, self._into, self._taken.words)


@pytest.fixture
def trial() -> Iterator[Callable[..., Trial]]:
    made: list[Trial] = []

    def new(*arguments: Any) -> Trial:
        made.append(Trial(*arguments))
        return made[-1]

    yield new
    for each in made:
        each.close()


NewTrial = Callable[..., Trial]


@pytest.mark.parametrize(
    ("guest", "words"),
    [
        ("auditor", "pages=1024 ratio=4 flush=1"),
        ("dirtier", f"start={MIB:#x} end={12 * MIB:#x} rounds=1"),
        ("longmode", "pages=256 ratio=4 flush=1"),
        ("longmode", "pages=256 ratio=8"),
    ],
)
def test_guests_at_work(machines: Sides, trial: NewTrial, guest: str, words: str) -> None:
    side = machines.make(guest, words, memory=40 * MIB)
    until(lambda: side.serial.text, "the guest has begun")
    side.pause()
    on_trial = trial(side)
    assert on_trial.run(SYNCS, 40) == []
    assert on_trial.seen > 20 * SYNCS


def test_a_log_that_loses_a_page_in_a_hundred_is_found_out(machines: Sides, trial: NewTrial) -> None:
    side = machines.make("auditor", "pages=1024 ratio=4")
    side.pause()
    engine = side.machine.cpu_log
    assert trial(side, Forgetful(engine, side.machine.ram.blocks[0].page_count)).run()


def test_a_write_of_the_vmm_past_its_only_way_is_found_out(machines: Sides, trial: NewTrial) -> None:
    side = machines.make("auditor")
    side.pause()
    on_trial = trial(side)
    block = side.machine.ram.blocks[0]
    block.write(5 * PAGE, b"told")
    assert on_trial.missing() == []
    block._mapping.write(5 * PAGE, b"not told")
    assert on_trial.missing() == [5]


def test_devices_reset_and_discards(machines: Sides, trial: NewTrial) -> None:
    devices = (DeviceConfig("virtio-rng-device"), DeviceConfig("virtio-serial-device"))
    side = machines.make("auditor", devices=devices)
    side.pause()
    on_trial = trial(side)
    virtio = side.machine.devices.virtio
    driver = Driver(side.machine.ram, virtio._transports[7], base=8 * MIB)
    virtio.resume()
    driver.start([0])
    for _ in range(20):
        driver.send(0, [], [9000])
        driver.notify(0)
        virtio.pause()
        assert virtio.wait_idle(DEADLINE_S)
        assert on_trial.missing() == []
        virtio.resume()
    assert on_trial.seen >= 60
    side.machine.ram.blocks[0].discard(0x800, 16)
    side.machine.reset("host-qmp-system-reset")  # loads the image again
    side.wait_event("RESET")
    assert on_trial.missing() == []
    assert on_trial.run(3) == []


@pytest.mark.slow
def test_linux_at_work(machines: Sides, trial: NewTrial) -> None:
    """A Debian kernel boots and forks: page tables, self-patching code, copy on write, file systems."""
    requires("linux")
    kernel, initrd = linux_images.kernel(), linux_images.initrd(LINUX_SCRIPT)
    boot = {"kernel": str(kernel.image), "initrd": str(initrd)}
    side = machines.make(None, APPEND, memory=128 * MIB, paused=True, **boot)
    on_trial = trial(side)
    assert on_trial.run(40, 400) == []
    while side.serial.text.count("ROUND") < 2:
        assert on_trial.run(10, 100) == []
