"""Exceptions, interrupts and open bus: what a guest meets is what a PC does."""

from __future__ import annotations

import struct

import pytest

from tests.vmm.cpu.conftest import ORIGIN, Box
from vmm.cpu.engine import ExitReason

IDT_AT = 0x2000
SEEN_AT = 0x3000  # rax: vector; then what the CPU pushed

# The handlers store vector, error code (0 if none), saved RIP, CS, RFLAGS and CR2, then latch.
WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17}


def idt64(vectors: list[int], gate: int = 0x8E00) -> str:
    """Assembler text that builds an IDT in long mode for `vectors` and loads it; all end in `seen`."""
    lines = []
    for vector in vectors:
        lines.append(
            f"lea handler{vector}(%rip), %rax; movl ${IDT_AT + 16 * vector:#x}, %edi;"
            f"movw %ax, (%rdi); movw $8, 2(%rdi); movw ${gate:#x}, 4(%rdi);"
            "shrq $16, %rax; movw %ax, 6(%rdi); movq $0, 8(%rdi)"
        )
    lines.append("lidt idtr(%rip); jmp body")
    for vector in vectors:
        push = "" if vector in WITH_ERROR_CODE else "pushq $0;"
        lines.append(f"handler{vector}: {push} movq ${vector}, %rbx; jmp seen")
    lines.append(
        f"seen: movl ${SEEN_AT:#x}, %edi; movq %rbx, (%rdi); popq 8(%rdi); popq 16(%rdi); popq 24(%rdi);"
        "popq 32(%rdi); movq %cr2, %rax; movq %rax, 40(%rdi); outb %al, $0xf4; jmp ."
    )
    lines.append(f"idtr: .word 0xfff; .quad {IDT_AT:#x}")
    return "\n".join(lines)


def seen(box: Box) -> tuple[int, ...]:
    return struct.unpack_from("<6Q", box.ram, SEEN_AT)


@pytest.mark.parametrize(
    ("prepare", "instruction", "vector", "code", "cr2"),
    [
        ("", "ud2", 6, 0, 0),
        ("movl $0x40000000, %eax", "movb $1, (%rax)", 14, 2, 0x40000000),
        ("movl $0x40000000, %eax", "movb (%rax), %al", 14, 0, 0x40000000),
        ("movl $0x28, %eax", "movw %ax, %ds", 13, 0x28, 0),
        ("movabsq $0x8000000000000000, %rax", "movb (%rax), %al", 13, 0, 0),
        ("xorl %ecx, %ecx", "divl %ecx", 0, 0, 0),
        ("", "int $0x41", 13, None, 0),  # QEMU 5's code is vector * 16 + 2, a PC's vector * 8 + 2
    ],
    ids=["ud2", "pf write", "pf read", "gp selector", "gp non-canonical", "divide", "int without gate"],
)
def test_a_fault_points_at_its_instruction(
    box: Box, prepare: str, instruction: str, vector: int, code: int | None, cr2: int
) -> None:
    box.load(f"{idt64([0, 6, 13, 14])}\nbody: lea 2f(%rip), %r15; {prepare}; nop; 2: {instruction}; hlt", 64)
    box.run_to_latch()
    got = seen(box)
    assert got[0] == vector
    assert code is None or got[1] == code
    assert got[2] == box.regs()[15]
    assert (got[3], got[5]) == (8, cr2)


def test_int_n_pushes_the_next_instruction(box: Box) -> None:
    box.load(f"{idt64([0x40, 3, 6])}\nbody: movl $77, %r12d; int $0x40; after: nop", 64)
    box.run_to_latch()
    vector, _, rip, *_ = seen(box)
    assert vector == 0x40
    assert box.ram[rip - 2 : rip] == b"\xcd\x40"


def test_software_int_6_is_no_undefined_opcode(box: Box) -> None:
    box.load(f"{idt64([6])}\nbody: int $6; nop", 64)
    box.run_to_latch()
    vector, _, rip, *_ = seen(box)
    assert vector == 6
    assert box.ram[rip - 2 : rip] == b"\xcd\x06"


def test_iretq_goes_on_after_an_interrupt(box: Box) -> None:
    text = (
        "lea h(%rip), %rax; movl $0x2400, %edi; movw %ax, (%rdi); movw $8, 2(%rdi); movw $0x8e00, 4(%rdi);"
        "shrq $16, %rax; movw %ax, 6(%rdi); movq $0, 8(%rdi); lidt i(%rip);"
        "movl $1000, %ecx; 1: int $0x40; decl %ecx; jnz 1b; outb %al, $0xf4; jmp .;"
        "h: incl %ebx; iretq; i: .word 0xfff; .quad 0x2000"
    )
    box.load(text, 64)
    box.run_to_latch()
    assert box.regs()[3] == 1000


def test_an_interrupt_waits_for_if_and_the_shadow_of_sti(box: Box) -> None:
    box.put(0x21 * 4, struct.pack("<HH", 0x1000, 0))
    box.put(0x1000, b"\x89\xcb\xe6\xf4\xeb\xfe")  # mov %cx, %bx; out %al, $0xf4; jmp .
    box.load("cli; movw $100, %cx; 1: loop 1b; movw $7, %cx; sti; movw $8, %cx; movw $9, %cx; jmp .", 16)
    box.set_irq_base(0x20)
    box.engine.set_irq(1, True)
    box.run_to_latch()
    assert box.regs()[3] in (8, 9)


def test_syscall_and_sysret(box: Box) -> None:
    text = """
        movl $0xc0000081, %ecx; xorl %eax, %eax; movl $0x00180008, %edx; wrmsr   # STAR
        movl $0xc0000082, %ecx; lea entry(%rip), %rax; xorl %edx, %edx; wrmsr    # LSTAR
        movl $0xc0000084, %ecx; movl $0x400, %eax; wrmsr                         # FMASK: DF
        pushq $0x23; pushq $0x7000; pushq $0x202; pushq $0x2b; lea user(%rip), %rax; pushq %rax; iretq
    user: movl $1, %r8d; stc; std
    call: syscall
    back: movl $2, %r9d; pushfq; popq %r14; movq %cs, %r15; syscall
    entry: incl %r10d; movq %cs, %r12; movq %ss, %r13; pushfq; popq %rbp
        cmpl $1, %r10d; jne done; sysretq
    done: outb %al, $0xf4; jmp .
    """
    state = box.load(text, 64)
    # 0x08 code64, 0x10 data; user: 0x23 data, 0x2b code64 (STAR 0x18 + 16)
    box.put(
        0x500,
        struct.pack(
            "<6Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
        ),
    )
    state["env.gdt"]["limit"] = 0x2F
    box.engine.set_cpu_state(state)
    box.run_to_latch()
    regs = box.regs()
    assert regs[8:11] == [1, 2, 2]
    assert (regs[12], regs[13]) == (0x08, 0x10)
    assert regs[15] == 0x2B
    assert regs[14] & 0x401 == 0x401, "CF and DF come back"
    assert regs[5] & 0x401 == 0x001, "FMASK took DF, and only DF"
    assert box.engine.get_cpu_state()["env.hflags"] & 3 == 0


def test_syscall_without_sce_is_an_undefined_opcode(box: Box) -> None:
    box.load(f"{idt64([6])}\nbody: syscall", 64, **{"env.efer": 0x500})
    box.run_to_latch()
    assert seen(box)[0] == 6


@pytest.mark.parametrize("bits", [32, 64])
def test_triple_fault(box: Box, bits: int) -> None:
    state = box.load("ud2", bits)
    state["env.idt"]["limit"] = 0
    box.engine.set_cpu_state(state)
    assert box.run().reason is ExitReason.TRIPLE_FAULT
    assert not box.engine.halted
    box.load("outb %al, $0xf4; jmp .", bits)
    box.run_to_latch()


def test_hlt_stands_after_itself_and_stays_halted(box: Box) -> None:
    box.load("cli; hlt; nop", 32)
    for _ in range(3):
        assert box.run().reason is ExitReason.HALTED
    assert box.engine.halted
    assert box.engine.get_cpu_state()["env.eip"] == ORIGIN + 2
    assert box.engine.counters()[0] == 1
    box.engine.reset()
    assert not box.engine.halted


@pytest.mark.parametrize("address", [0x400000, 0x7FFFFFFD, 0xFEE00000, 0xFFFFF000])
def test_no_ram_reads_ones_and_loses_writes(box: Box, address: int) -> None:
    text = f"""
        movl ${address:#x}, %esi; movl $0x12345678, (%esi); movl (%esi), %eax; movw (%esi), %bx
        movb (%esi), %cl; movq (%esi), %mm0; movq %mm0, 0x6000; outb %al, $0xf4; jmp .
    """
    box.load(text, 32)
    box.run_to_latch()
    regs = box.regs()
    assert regs[0] == 0xFFFFFFFF
    assert regs[3] & 0xFFFF == 0xFFFF
    assert regs[1] & 0xFF == 0xFF
    assert box.u64(0x6000) == 0xFFFFFFFFFFFFFFFF


def test_an_access_across_the_end_of_ram_is_half_there(box: Box) -> None:
    box.load("movl $0x44332211, 0x1ffffe; movl 0x1ffffe, %eax; outb %al, $0xf4; jmp .", 32)
    box.run_to_latch()
    assert box.regs()[0] == 0xFFFF2211


def test_executing_where_no_ram_is_makes_an_undefined_opcode(box: Box) -> None:
    box.load(f"{idt64([6])}\nbody: movl $0x3ff00000, %eax; jmp *%rax", 64)
    box.run_to_latch()
    assert seen(box)[0] == 6
    assert seen(box)[2] == 0x3FF00000


def test_page_tables_where_no_ram_is_fault_and_do_not_crash(box: Box) -> None:
    for root in (0x40000000, 0xFFFFFFFFFF000):
        box.load("nop; outb %al, $0xf4", 64, **{"env.cr[3]": root})
        assert box.run().reason is ExitReason.TRIPLE_FAULT
