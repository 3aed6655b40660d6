"""Code that is replaced in guest RAM runs as the new code, by whichever way it came there.

The guest calls a function at FUNCTION for ever and stores its answer: 'A' from the old one, 'B' from the new
one. It has called the old one thousands of times when the new one comes, so the engine has translated it.
"""

from __future__ import annotations

import pathlib

import pytest

from tests.support.assemble import assemble
from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.requires import requires

CALLER = 0x7C00
FUNCTION = 0x8000
ANSWER = 0xA000
COUNT = 0xA004

LOOP = f"1: call {FUNCTION:#x}\n mov %al, {ANSWER:#x}\n incl {COUNT:#x}\n jmp 1b\n"


def function(letter: str) -> bytes:
    return assemble(f"mov ${ord(letter)}, %al\n ret\n", FUNCTION, 16)


@pytest.fixture
def boot_sector(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "caller.img"
    path.write_bytes(assemble(LOOP, CALLER, 16).ljust(510, b"\0") + b"\x55\xaa")
    return str(path)


def caller(machines: Sides, boot_sector: str, letter: str, **options: object) -> Side:
    """A machine of 2 MiB whose function gives `letter`; it runs unless it is paused."""
    side = machines.make(None, memory=2 * MIB, boot_drive=boot_sector, **options)
    side.machine.ram.write(FUNCTION, function(letter))
    return side


def count(side: Side) -> int:
    return int.from_bytes(side.machine.ram.read(COUNT, 4), "little")


def wait_answer(side: Side, letter: str) -> None:
    """Until the guest has got this answer; then it must stay so for thousands of calls."""
    until(lambda: side.machine.ram.read(ANSWER, 1) == letter.encode(), f"the answer {letter}")
    before = count(side)
    until(lambda: count(side) > before + 5000, "5000 more calls")
    assert side.machine.ram.read(ANSWER, 1) == letter.encode()


def running_caller(machines: Sides, boot_sector: str) -> Side:
    side = caller(machines, boot_sector, "A", paused=True)
    side.machine.cont()
    wait_answer(side, "A")
    return side


def store_behind_everything(side: Side, data: bytes) -> None:
    """What native code does when it places a page: nobody is told."""
    side.machine.ram.blocks[0]._mapping.write(FUNCTION, data)


def test_host_write_while_the_guest_runs(machines: Sides, boot_sector: str) -> None:
    side = running_caller(machines, boot_sector)
    side.machine.ram.write(FUNCTION, function("B"))
    wait_answer(side, "B")


def test_host_write_while_the_guest_is_stopped(machines: Sides, boot_sector: str) -> None:
    side = running_caller(machines, boot_sector)
    side.pause()
    side.machine.ram.write(FUNCTION, function("B"))
    side.machine.cont()
    wait_answer(side, "B")


def test_discard_and_new_page(machines: Sides, boot_sector: str) -> None:
    side = running_caller(machines, boot_sector)
    side.pause()
    side.machine.ram.blocks[0].discard(FUNCTION // PAGE, 1)
    store_behind_everything(side, function("B"))
    side.machine.cont()
    wait_answer(side, "B")


def test_restored_cpu_state(machines: Sides, boot_sector: str) -> None:
    side = running_caller(machines, boot_sector)
    side.pause()
    store_behind_everything(side, function("B"))
    side.machine.engine.set_cpu_state(side.machine.engine.get_cpu_state())
    side.machine.cont()
    wait_answer(side, "B")


def test_guest_store_by_the_guest_itself(machines: Sides, tmp_path: pathlib.Path) -> None:
    """The function is rewritten by the caller after its 1000th call, through another segment's address."""
    text = f"""
        xor %cx, %cx
    1:  call {FUNCTION:#x}
        mov %al, {ANSWER:#x}
        incl {COUNT:#x}
        inc %cx
        cmp $1000, %cx
        jne 1b
        mov $0x700, %ax
        mov %ax, %es
        movb ${ord("B")}, %es:0x1001   # 0x7000 + 0x1001 = FUNCTION + 1
        jmp 1b
    """
    path = tmp_path / "rewriter.img"
    path.write_bytes(assemble(text, CALLER, 16).ljust(510, b"\0") + b"\x55\xaa")
    side = caller(machines, str(path), "A", paused=True)
    side.machine.cont()
    wait_answer(side, "B")


def run_by_force(side: Side) -> None:
    """Let the engine of a machine that waits for a migration run the old function, as no machine should."""
    machine = side.machine
    machine._load_image()
    machine.ram.write(FUNCTION, function("A"))
    machine.vcpu.resume()
    wait_answer(side, "A")
    machine.vcpu.request_pause()
    assert machine.vcpu.wait_paused(10)


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
def test_incoming_page_of_a_migration(machines: Sides, boot_sector: str, way: str) -> None:
    destination = machines.make(None, memory=2 * MIB, boot_drive=boot_sector, incoming=True)
    run_by_force(destination)
    destination.migrator.incoming(machines.uri)
    source = caller(machines, boot_sector, "B", paused=True)
    source.machine.cont()
    wait_answer(source, "B")
    if way == "postcopy":
        requires("uffd")
        for side in (source, destination):
            side.capability("postcopy-ram")
        # Nearly all pages are zeroes: without a tight limit precopy is over before postcopy is asked for.
        machines.to_postcopy(source, destination, max_bandwidth=PAGE)
    else:
        source.migrator.migrate(machines.uri)
    machines.finish(source, destination)
    calls = int.from_bytes(source.machine.ram.read(COUNT, 4), "little")
    wait_answer(destination, "B")
    assert count(destination) > calls
