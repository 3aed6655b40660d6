"""The timer interrupts a guest, halted or busy; a halted vCPU misses nothing and keeps nobody waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.vmm.cpu.conftest import Box
from vmm.cpu.ticker import Ticker
from vmm.cpu.vcpu import Vcpu
from vmm.devices.pit import PitModel

DEADLINE_S = 60.0
TICK = 1193
"""Of the timer's clock: 1 ms."""
VECTOR = 0x20
HANDLER = 0x1000
COUNTER = 0x6000
NMI_COUNTER = 0x6004

HALTS = "sti; 1: hlt; jmp 1b"
SPINS = "sti; 1: incl %ebx; jmp 1b"
PERIODIC = (
    f"movb $0x34, %al; outb %al, $0x43; movw ${TICK}, %ax; outb %al, $0x40; movb %ah, %al; outb %al, $0x40; "
)
ONE_SHOT = PERIODIC.replace("0x34", "0x38")
AGAIN = ONE_SHOT.split("; ", 2)[2]
EOI = "movb $0x20, %al; outb %al, $0x20; popw %ax; iretw"


@pytest.fixture
def guest(box: Box) -> Iterator[Vcpu]:
    """A vCPU whose timer runs; at VECTOR it counts, at 2 (NMI) too."""
    box.engine.enable_pics()
    box.engine.enable_pit()
    box.engine.set_pit(PitModel().registers())
    box.engine.set_clock(-time.monotonic_ns(), True)
    vcpu = Vcpu(box.engine)
    yield vcpu
    assert vcpu.shutdown(DEADLINE_S)


def load(box: Box, text: str, handler: str = "") -> None:
    box.load(f"pushw %ax; incl ({COUNTER}); {handler} {EOI}", 16, HANDLER)
    box.load(f"incl ({NMI_COUNTER}); iretw", 16, HANDLER + 0x100)
    box.load(text, 16)
    box.set_irq_base(VECTOR)
    box.put(VECTOR * 4, HANDLER.to_bytes(4, "little"))
    box.put(2 * 4, (HANDLER + 0x100).to_bytes(4, "little"))


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0)


def wait_count(box: Box, counter: int, count: int) -> None:
    wait(lambda: box.u32(counter) == count)


def run_until(box: Box, vcpu: Vcpu, ticks: int) -> float:
    """Let it run until it has counted so many; gives the seconds that took."""
    began = time.monotonic()
    if not vcpu.thread_id:
        vcpu.start_thread()
    vcpu.resume()
    wait(lambda: box.u32(COUNTER) >= ticks)
    took = time.monotonic() - began
    vcpu.request_pause()
    assert vcpu.wait_paused(DEADLINE_S)
    return took


def test_a_halted_vcpu_takes_its_ticks_with_no_other_thread(box: Box, guest: Vcpu) -> None:
    load(box, PERIODIC + HALTS)
    assert run_until(box, guest, 20) >= 0.019
    assert box.engine.halted


def test_a_guest_that_programs_each_tick_anew_gets_each(box: Box, guest: Vcpu) -> None:
    load(box, ONE_SHOT + HALTS, AGAIN)
    assert run_until(box, guest, 20) >= 0.019


@pytest.mark.parametrize(
    ("first", "handler"), [(PERIODIC, ""), (ONE_SHOT, AGAIN)], ids=["periodic", "one shot"]
)
def test_a_busy_guest_is_interrupted_by_the_thread_tick(
    box: Box, guest: Vcpu, first: str, handler: str
) -> None:
    load(box, first + SPINS, handler)
    ticker = Ticker(box.engine)
    ticker.start()
    assert run_until(box, guest, 20) >= 0.019
    assert ticker.close(DEADLINE_S)


def test_while_the_clock_stands_no_tick_comes(box: Box, guest: Vcpu) -> None:
    load(box, PERIODIC + HALTS)
    run_until(box, guest, 2)
    box.engine.set_clock(5_000_000, False)
    counted = box.u32(COUNTER)
    guest.resume()
    time.sleep(0.02)
    assert box.u32(COUNTER) <= counted + 1  # one may have been pending
    box.engine.set_clock(5_000_000 - time.monotonic_ns(), True)  # a halted vCPU hears of it
    run_until(box, guest, counted + 5)


def test_ticks_for_which_there_was_no_time_come_later(box: Box, guest: Vcpu) -> None:
    load(box, PERIODIC + HALTS)
    run_until(box, guest, 2)
    counted = box.u32(COUNTER)
    time.sleep(0.1)
    assert run_until(box, guest, counted + 90) < 0.09
    assert box.engine.owed_irqs(0) < 90


def test_the_halt_and_the_deadline_travel(box: Box, another_box: Box, guest: Vcpu) -> None:
    load(box, PERIODIC + HALTS)
    run_until(box, guest, 5)
    engine, other = box.engine, another_box.engine
    other.enable_pics()
    other.enable_pit()
    another_box.put(0, bytes(box.ram[:0x10000]))
    other.set_cpu_state(engine.get_cpu_state())
    other.set_pics(*engine.get_pics())
    other.halted = engine.halted
    other.set_pit(engine.get_pit())
    other.set_clock(int(engine.get_pit()["channels"][0]["next_transition_time"]) - time.monotonic_ns(), True)
    there = Vcpu(other)
    run_until(another_box, there, 10)
    assert there.shutdown(DEADLINE_S)


def test_an_nmi_ends_a_halt_without_interrupts(box: Box, guest: Vcpu) -> None:
    load(box, "cli; 1: hlt; jmp 1b")
    guest.start_thread()
    guest.resume()
    for count in range(1, 100):
        wait(lambda: box.engine.halted)
        box.engine.inject_nmi()
        wait_count(box, NMI_COUNTER, count)


def test_a_masked_interrupt_does_not_end_a_halt(box: Box, guest: Vcpu) -> None:
    load(box, "cli; hlt; incl (0x6008); 1: hlt; jmp 1b")
    guest.start_thread()
    guest.resume()
    wait(lambda: box.engine.halted)
    box.engine.set_irq(1, True)
    time.sleep(0.01)
    assert not box.u32(0x6008)


def test_a_halted_vcpu_stops_and_lets_others_work_at_once(box: Box, guest: Vcpu) -> None:
    load(box, "cli; 1: hlt; jmp 1b")
    guest.start_thread()
    began = time.monotonic()
    for _ in range(200):
        guest.resume()
        wait(lambda: box.engine.halted)
        box.engine.flush()
        guest.request_pause()
        assert guest.wait_paused(DEADLINE_S)
    assert time.monotonic() - began < 2


def test_interrupts_from_elsewhere_end_each_halt(box: Box, guest: Vcpu) -> None:
    load(box, HALTS)
    box.put((VECTOR + 1) * 4, HANDLER.to_bytes(4, "little"))
    guest.start_thread()
    guest.resume()
    for count in range(1, 2000):
        box.engine.set_irq(1, True)
        box.engine.set_irq(1, False)
        wait_count(box, COUNTER, count)


def test_the_end_of_the_ticks_holds_whatever_is_armed_after_it(box: Box) -> None:
    pit = PitModel()
    pit.channels[0].next_transition_time = 10**18
    box.engine.enable_pit()
    box.engine.set_pit(pit.registers())
    box.engine.end_ticks()
    box.engine.set_clock(-time.monotonic_ns(), True)
    thread = threading.Thread(target=box.engine.serve_ticks, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
