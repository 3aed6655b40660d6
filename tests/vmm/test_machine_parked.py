"""A stop while the vCPU waits for a page: precise to the block, not lost, and not heard before `cont`."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Iterator

import pytest

from tests.support.assemble import assemble
from tests.support.real_machines import Output, until
from tests.support.requires import requires
from uffd import PAGE_SIZE_BYTES, Mapping, Mode, Userfaultfd
from vmm.config import BackendConfig, MachineConfig
from vmm.machine import Machine
from vmm.run_state import RunState

MISSING = 0x10000
DEADLINE_S = 60.0

OUT = "mov $0x3f8, %dx; mov ${byte}, %al; out %al, (%dx)\n"


def say(text: str) -> str:
    return "".join(OUT.format(byte=ord(character)) for character in text)


CODE = (
    f"mov ${MISSING >> 4:#x}, %ax; mov %ax, %ds\n"
    f"{say('a')} movb 0, %bl\n{say('bc')} jmp 3f\n"
    f"3: {say('d')} 4: jmp 4b"
)
"""Says a, waits for the page, and has two bytes more to say in the same block."""


class Parked:
    """A machine whose vCPU waits for one page."""

    def __init__(self, folder: pathlib.Path) -> None:
        (folder / "disk").write_bytes(assemble(CODE, 0x7C00, 16).ljust(510, b"\0") + b"\x55\xaa")
        self.machine = Machine(
            MachineConfig(
                machine_type="none", ram=(BackendConfig("ram", 2 << 20),), boot_drive=str(folder / "disk")
            )
        )
        self.output = Output()
        self.machine.devices.serial.sink = self.output
        self.events: list[str] = []
        self.machine.add_listener(lambda name, data: self.events.append(name))
        self.uffd = Userfaultfd()
        self.address = self.machine.ram.blocks[0].host_address + MISSING
        self.uffd.register(self.address, PAGE_SIZE_BYTES, Mode.MISSING)
        self.machine.start()
        until(self.uffd.read_faults_nowait, "a fault")

    def place(self) -> None:
        page = Mapping(PAGE_SIZE_BYTES)
        page.write(0, b"x")
        assert self.uffd.copy(self.address, page.address, PAGE_SIZE_BYTES).errno == 0
        page.close()

    def close(self) -> None:
        assert self.machine.vcpu.shutdown(DEADLINE_S)
        self.uffd.unregister(self.address, PAGE_SIZE_BYTES)
        self.uffd.close()
        assert self.machine.close(DEADLINE_S)


@pytest.fixture
def parked(tmp_path: pathlib.Path) -> Iterator[Parked]:
    requires("uffd")
    made = Parked(tmp_path)
    yield made
    made.close()


def test_the_rest_of_the_block_is_heard_after_cont(parked: Parked) -> None:
    machine = parked.machine
    assert parked.output.text == "a"
    assert machine.stop(wait_s=0.005) is False
    assert machine.run_state is RunState.PAUSED
    assert not machine.vcpu_is_paused
    assert parked.events == ["RESUME", "STOP"]
    parked.place()
    until(lambda: machine.vcpu_is_paused, "the acknowledgement that nobody waits for")
    assert parked.output.text == "a"
    machine.cont()
    until(lambda: parked.output.text == "abcd", "what was held, and what comes after it")


def test_cont_before_the_page_comes(parked: Parked) -> None:
    for _ in range(3):
        assert parked.machine.stop(wait_s=0.001) is False
        parked.machine.cont()
    parked.place()
    until(lambda: parked.output.text == "abcd", "the guest")
    until(lambda: "stop" not in {thread.name for thread in threading.enumerate()}, "the end of the helper")


def test_what_was_held_is_given_out_before_the_guest_leaves(parked: Parked) -> None:
    machine = parked.machine
    machine.stop(wait_s=0.001)
    assert machine.stop_for_migration(wait_s=0.01) is False, "it waits until the vCPU has acknowledged"
    parked.place()
    assert machine.stop_for_migration(wait_s=DEADLINE_S)
    machine.quiesce_devices(1)
    assert parked.output.text == "abc"
