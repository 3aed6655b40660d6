"""Code that changes under the translator, and the engine's own log of stores."""

from __future__ import annotations

import array
import struct

import pytest

from tests.support.assemble import assemble
from tests.vmm.cpu.conftest import ALIAS, PAGE_TABLES_AT, Box, with_alias
from vmm.cpu.engine import ExitReason
from vmm.cpu.errors import CpuError

PAGE = 4096
CODE_AT = 0x10000
NX = 1 << 63

RETURN = {n: assemble(f"movl ${n}, %eax; ret", 0, 32) for n in (1, 2, 3)}
CALLER = f"call {CODE_AT:#x}; movl %eax, %ebx; outb %al, $0xf4; jmp _start"


# A guest that calls code, is stopped while that code is replaced from outside, and calls it again.


def replaced_and_invalidated(box: Box, code: bytes) -> None:
    box.put(CODE_AT, code)
    box.engine.invalidate(CODE_AT, len(code))


def replaced_and_flushed(box: Box, code: bytes) -> None:
    box.put(CODE_AT, code)
    box.engine.flush()


def replaced_and_state_set(box: Box, code: bytes) -> None:
    box.put(CODE_AT, code)
    box.engine.set_cpu_state(box.engine.get_cpu_state())


@pytest.mark.parametrize("replace", [replaced_and_invalidated, replaced_and_flushed, replaced_and_state_set])
@pytest.mark.parametrize("bits", [32, 64])
def test_code_replaced_from_outside_runs_as_the_new_code(box: Box, bits: int, replace: object) -> None:
    assert callable(replace)
    box.put(CODE_AT, RETURN[1])
    box.load(CALLER, bits)
    box.run_to_latch()
    for n in (2, 3, 1):
        replace(box, RETURN[n])
        box.run_to_latch()
        assert box.regs()[3] == n


def test_code_replaced_by_a_port_handler_runs_as_the_new_code(box: Box) -> None:
    box.put(CODE_AT, RETURN[1])
    box.load(f"1: call {CODE_AT:#x}; addl %eax, %ebx; outb %al, $0x80; cmpl $6, %ebx; jb 1b; hlt", 32)
    box.engine.set_port_handlers(
        lambda port, size: 0, lambda port, size, value: replaced_and_invalidated(box, RETURN[value % 3 + 1])
    )
    assert box.run().reason is ExitReason.HALTED
    assert box.regs()[3] == 6


@pytest.mark.parametrize("flags", [7, 7 | NX], ids=["executable alias", "NX alias"])
def test_a_guest_patches_code_through_an_alias(box: Box, flags: int) -> None:
    text = f"""
        movl $200, %ecx; movl ${ALIAS + CODE_AT + 1:#x}, %esi; movl ${CODE_AT:#x}, %edi; xorl %r8d, %r8d
        movb $0, (%rsi)
    1:  call *%rdi; cmpl %r8d, %eax; jne bad; incl %r8d; movb %r8b, (%rsi); decl %ecx; jnz 1b
        outb %al, $0xf4
    bad: hlt
    """
    box.put(CODE_AT, RETURN[1])
    state = box.load(text, 64)
    with_alias(box, flags)
    box.engine.set_cpu_state(state | {"env.efer": 0xD01})  # NXE
    box.run_to_latch()


@pytest.mark.parametrize("flags", [7, 7 | NX], ids=["executable alias", "NX alias"])
def test_a_store_beside_code_does_not_hide_the_patch_after_it(box: Box, flags: int) -> None:
    """The first store through the alias hits no code, but the page has some; the second must be seen."""
    text = f"""
        movl $50, %ecx; movl ${ALIAS + CODE_AT + 0x401:#x}, %esi; movl ${CODE_AT + 0x400:#x}, %edi
        movl ${CODE_AT:#x}, %edx; xorl %r8d, %r8d; movb $0, (%rsi)
    1:  call *%rdx; call *%rdi; cmpl %r8d, %eax; jne bad
        incl 0x800 - 0x401(%rsi); incl %r8d; movb %r8b, (%rsi); decl %ecx; jnz 1b
        outb %al, $0xf4
    bad: hlt
    """
    box.put(CODE_AT, RETURN[1])
    box.put(CODE_AT + 0x400, RETURN[2])
    state = box.load(text, 64)
    with_alias(box, flags)
    box.engine.set_cpu_state(state | {"env.efer": 0xD01})
    box.run_to_latch()


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_guest_patches_the_next_instruction(box: Box, bits: int) -> None:
    text = """
        movw $50, %cx; xorw %bx, %bx; movb $0, %dl
    1:  movb %dl, patch+1; patch: movb $0xff, %al; cmpb %dl, %al; jne bad; incb %dl; decw %cx; jnz 1b
        outb %al, $0xf4
    bad: hlt
    """
    box.load(text, bits)
    box.run_to_latch()


def test_stores_beside_code_leave_the_slow_path_only_without_code(box: Box) -> None:
    box.load("movl $100000, %ecx; 1: incl 0x20000; decl %ecx; jnz 1b; outb %al, $0xf4", 32)
    box.run_to_latch()
    assert box.engine.counters()[1] < 100


def test_ram_cannot_be_mapped_wrongly(box: Box) -> None:
    for guest, length in ((0, PAGE), (0x200001, PAGE), (0x200000, 0), (1 << 40, PAGE)):
        with pytest.raises(CpuError):
            box.engine.map_ram(guest, box.host_address, length)
    box.load("hlt", 32)
    box.run()
    with pytest.raises(CpuError):
        box.engine.map_ram(0x400000, box.host_address, PAGE)


def test_two_ranges_of_ram_are_told_apart(box: Box) -> None:
    high = Box(ram_bytes=512 * PAGE)
    box.engine.map_ram(1 << 32, high.host_address, 512 * PAGE)
    box.load(
        "movq $0x100003000, %rdi; movb $0xc3, (%rdi); call *%rdi; incl 0x2000(%rdi); movw $0x9090, (%rdi);"
        "movl $0xf4e6, 2(%rdi); call *%rdi",  # out %al, $0xf4
        64,
    )
    box.put(PAGE_TABLES_AT + 0x1000 + 4 * 8, struct.pack("<Q", 0x1E0000 | 7))
    box.put(0x1E0000, struct.pack("<Q", 1 << 32 | 0x87))
    box.engine.start_log()
    box.run_to_latch()
    assert high.u32(0x5000) == 1
    words, low = array.array("Q", bytes(64)), array.array("Q", bytes(64))
    targets = [(0, 512, low.buffer_info()[0], 0), (1 << 32, 512, words.buffer_info()[0], 0)]
    box.engine.collect_log(box.engine.aim_log(targets))
    assert words[0] == 1 << 3 | 1 << 5
    box.close()  # before the memory of `high` goes
    high.close()
