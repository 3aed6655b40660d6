"""The guest's time stamp counter: stock's cpu_get_ticks, through RDTSC, RDTSCP and MSR 0x10."""

from __future__ import annotations

import threading
import time

import pytest

from tests.vmm.cpu.conftest import Box
from vmm.clock import VirtualClock
from vmm.cpu.engine import Exit, ExitReason

READ = "shlq $32, %rdx; orq %rdx, %rax"
GUEST = f"""
    movl $0xc0000103, %ecx; movl $77, %eax; xorl %edx, %edx; wrmsr  # TSC_AUX
    rdtsc; {READ}; movq %rax, %r8
    rdtscp; {READ}; movq %rax, %r9; movq %rcx, %r11
    movl $0x10, %ecx; rdmsr; {READ}; movq %rax, %r10
    outb %al, $0xf4; jmp _start
"""


@pytest.fixture
def tsc(box: Box) -> Box:
    from vmm.cpu.cpuid import CpuModel
    from vmm.cpu.engine import Engine

    box.engine.close()
    box.engine = Engine(CpuModel.parse("qemu64,+rdtscp"))
    box.engine.map_ram(0, box.host_address, len(box.ram))
    box.engine.set_port_handlers(box._read, box._write)
    box.load(GUEST, 64)
    return box


def read(box: Box) -> list[int]:
    box.run_to_latch()
    regs = box.regs()
    assert regs[11] == 77
    return regs[8:11]


def test_it_stands_still_until_the_ticks_are_enabled(tsc: Box) -> None:
    tsc.engine.cpu_ticks_offset = 123_456_789_012
    assert read(tsc) == [123_456_789_012] * 3
    time.sleep(0.001)
    assert read(tsc) == [123_456_789_012] * 3


def test_it_runs_from_where_it_stood_at_the_hosts_rate(tsc: Box) -> None:
    start = 1 << 50
    tsc.engine.cpu_ticks_offset = start
    tsc.engine.enable_ticks()
    first = read(tsc)
    assert start < first[0] < first[1] < first[2] < start + 10**10
    tsc.engine.disable_ticks()
    frozen = tsc.engine.cpu_ticks_offset
    assert frozen == tsc.engine.ticks > first[2]
    assert read(tsc) == [frozen] * 3
    tsc.engine.enable_ticks()
    tsc.engine.enable_ticks()
    again = read(tsc)
    assert frozen <= again[0] < frozen + 10**10
    assert tsc.engine.cpu_ticks_offset < frozen


def test_the_offset_of_the_cpu_section_is_added(tsc: Box) -> None:
    tsc.engine.cpu_ticks_offset = 1000
    state = tsc.engine.get_cpu_state()
    tsc.engine.set_cpu_state(state | {"env.tsc_offset": 500})
    assert read(tsc) == [1500] * 3


def test_writing_the_msr_sets_the_counter(tsc: Box) -> None:
    tsc.engine.cpu_ticks_offset = 1000
    tsc.load(f"movl $0x10, %ecx; movl $5, %edx; movl $7, %eax; wrmsr; {GUEST}", 64)
    assert read(tsc) == [5 << 32 | 7] * 3
    assert tsc.engine.get_cpu_state()["env.tsc_offset"] == (5 << 32 | 7) - 1000


def test_cr4_tsd_keeps_it_from_user_mode(box: Box) -> None:
    """Ring 3 gets #GP, which is a triple fault without an IDT; ring 0 does not."""
    state = box.load("rdtsc; outb %al, $0xf4; jmp .", 32)
    state["env.cr[4]"] |= 4
    box.engine.set_cpu_state(state)
    box.run_to_latch()
    for segment in state["env.segs"]:
        segment["flags"] |= 3 << 13
        segment["selector"] |= 3
    state["env.eflags"] |= 3 << 12  # IOPL, for OUT
    state["env.hflags"] |= 3 | 3 << 12
    box.engine.set_cpu_state(state)
    assert box.run().reason.name == "TRIPLE_FAULT"


def test_a_stop_within_a_calibration_is_not_hidden_from_a_clock_that_stood_still(box: Box) -> None:
    """It would pass for the guest twice: its clock and its TSC would go back by as long as it was stopped."""
    box.engine.enable_pit()
    box.load(f"1: inb $0x40, %al; rdtsc; {READ}; movq %rax, %r8; outb %al, $0xf4; jmp 1b", 64)
    clock = VirtualClock(box.engine.host_ns, box.engine.set_clock)
    box.engine.enable_ticks()
    clock.start()
    box.run_to_latch()
    clock.stop()
    box.engine.disable_ticks()
    stood_at_ns, stood_at = clock.offset, box.engine.ticks
    time.sleep(0.05)
    box.engine.enable_ticks()
    clock.start()
    box.run_to_latch()
    shown_at = box.regs()[8]
    box.run_to_latch()
    assert clock.now_ns() > stood_at_ns
    assert stood_at < shown_at < box.regs()[8]


def test_no_read_falls_between_two_halves_of_a_stop(box: Box) -> None:
    """The clocks stop while the vCPU runs; a read halfway takes the host's TSC for the guest's."""
    box.load(
        f"""
        rdtsc; {READ}; movq %rax, %r8
        1: rdtsc; {READ}; movq %rax, %rbx; subq %r8, %rbx; movq %rax, %r8; cmpq %r12, %rbx; jbe 1b
        outb %al, $0xf4; jmp .
        """,
        64,
    )
    state = box.engine.get_cpu_state()
    state["env.regs"][12] = 1 << 36
    box.engine.set_cpu_state(state)
    box.engine.cpu_ticks_offset = 1 << 50
    box.engine.clear_stop()
    results: list[Exit] = []
    vcpu = threading.Thread(target=lambda: results.append(box.engine.run()))
    vcpu.start()
    for _ in range(500_000):
        box.engine.enable_ticks()
        box.engine.disable_ticks()
    box.engine.request_stop()
    vcpu.join()
    assert results[0].reason is ExitReason.STOPPED, [hex(reg) for reg in box.regs()]
