"""Interrupts and NMIs from other threads: each is taken, once, whatever the vCPU does at that moment."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.assemble import assemble
from tests.vmm.cpu.conftest import Box
from vmm.cpu.engine import ExitReason
from vmm.cpu.vcpu import Vcpu

pytestmark = pytest.mark.usefixtures("short_switch_interval")

ROUNDS = 200_000 if os.environ.get("PAGEFERRY_SOAK") == "1" else 2000
HANDLERS_AT = 0x1000
NMIS_AT, IRQS_AT = 0x3000, 0x3004
IRQ, IRQ_BASE = 1, 0x20
HANDLERS = f"nmi: incl {NMIS_AT}; iret; .org 0x10; irq: incl {IRQS_AT}; iret"

GUESTS = {
    "a loop": "sti; 1: incl %ebx; jmp 1b",
    "a loop that is never left": "sti; 1: jmp 1b",
    "halted": "sti; 1: hlt; jmp 1b",
    "a loop that closes and opens the gate": "1: cli; incl %ebx; sti; incl %ebx; jmp 1b",
}


@pytest.fixture
def vcpu(box: Box) -> Iterator[Vcpu]:
    made = Vcpu(box.engine)
    made.start_thread()
    yield made
    assert made.shutdown(10)


def load(box: Box, text: str) -> None:
    """A guest in real mode, with handlers that count what comes; the controller needs no EOI."""
    box.load(text, 16)
    box.put(HANDLERS_AT, assemble(HANDLERS, HANDLERS_AT, 16))
    box.put(2 * 4, struct.pack("<HH", HANDLERS_AT, 0))
    box.put((IRQ_BASE + IRQ) * 4, struct.pack("<HH", HANDLERS_AT + 0x10, 0))
    first, second = box.engine.get_pics()
    box.engine.set_pics(first | {"irq_base": IRQ_BASE, "auto_eoi": 1}, second)


def interrupts(box: Box, rounds: int) -> str:
    """Raise the line so often, each time when the last one was taken; what went wrong."""

    def pulse() -> None:
        box.engine.set_irq(IRQ, True)
        box.engine.set_irq(IRQ, False)

    return one_by_one(pulse, lambda: box.u32(IRQS_AT), rounds, "interrupt")


def nmis(box: Box, rounds: int) -> str:
    """As `interrupts`."""
    return one_by_one(box.engine.inject_nmi, lambda: box.u32(NMIS_AT), rounds, "NMI")


def one_by_one(make: Callable[[], None], taken: Callable[[], int], rounds: int, what: str) -> str:
    for number in range(1, rounds + 1):
        make()
        end_s = time.monotonic() + 5
        while taken() < number:
            if time.monotonic() > end_s:
                return f"{what} {number} was lost"
            time.sleep(0)
    return "" if taken() == rounds else f"{taken()} for {rounds} of {what}"


@pytest.mark.parametrize("guest", sorted(GUESTS))
def test_each_interrupt_is_taken(box: Box, vcpu: Vcpu, guest: str) -> None:
    load(box, GUESTS[guest])
    vcpu.resume()
    assert interrupts(box, ROUNDS) == ""


@pytest.mark.parametrize("guest", sorted(GUESTS))
def test_interrupts_and_nmis_do_not_take_each_other_away(box: Box, vcpu: Vcpu, guest: str) -> None:
    load(box, GUESTS[guest])
    vcpu.resume()
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(nmis(box, ROUNDS)))
    other.start()
    found.append(interrupts(box, ROUNDS))
    other.join()
    assert found == ["", ""]


def test_an_nmi_that_is_blocked_ends_no_halt(box: Box) -> None:
    """Until the handler of the last one returns the CPU takes no other; it keeps one."""
    load(box, "1: jmp 1b")
    box.put(HANDLERS_AT, assemble(f"incl {NMIS_AT}; cli; hlt; outb %al, $0xf4", HANDLERS_AT, 16))
    box.engine.inject_nmi()
    assert box.run().reason is ExitReason.HALTED
    box.engine.inject_nmi()
    assert box.run().reason is ExitReason.HALTED
    assert box.engine.interrupt_request == 0x200
    assert box.u32(NMIS_AT) == 1
