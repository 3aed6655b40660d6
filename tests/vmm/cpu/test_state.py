"""The CPU state: stock's bytes, and bit-exact journeys through the wire into another engine."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.cpu.conftest import Box
from vmm.cpu.cpuid import CpuModel
from vmm.cpu.engine import Engine, ExitReason
from vmm.cpu.state import CPU_COMMON_DESCRIPTION, CPU_DESCRIPTION, KEPT, reset_values
from vmm.errors import VMStateError
from vmm.vmstate import BytesSource, Description, Values, decode, encode

OFFSETS = {
    "env.regs": 0, "env.eip": 128, "env.eflags": 136, "env.hflags": 144, "env.fpuc": 148,
    "env.fpus_vmstate": 150, "env.fptag_vmstate": 152, "env.fpregs_format_vmstate": 154, "env.fpregs": 156,
    "env.segs": 236, "env.ldt": 356, "env.tr": 376, "env.gdt": 396, "env.idt": 416, "env.sysenter_cs": 436,
    "env.sysenter_esp": 440, "env.sysenter_eip": 448, "env.cr[0]": 456, "env.cr[2]": 464, "env.cr[3]": 472,
    "env.cr[4]": 480, "env.dr": 488, "env.a20_mask": 552, "env.mxcsr": 556, "env.xmm_regs[0]": 560,
    "env.efer": 816, "env.star": 824, "env.lstar": 832, "env.cstar": 840, "env.fmask": 848,
    "env.kernelgsbase": 856, "env.smbase": 864, "env.pat": 868, "env.hflags2": 876, "env.vm_hsave": 880,
    "env.vm_vmcb": 888, "env.tsc_offset": 896, "env.intercept": 904, "env.intercept_cr_read": 912,
    "env.intercept_dr_write": 918, "env.intercept_exceptions": 920, "env.v_tpr": 924, "env.mtrr_fixed": 925,
    "env.mtrr_deftype": 1013, "env.mtrr_var": 1021, "env.interrupt_injected": 1149, "env.mp_state": 1153,
    "env.tsc": 1157, "env.exception_nr": 1165, "env.soft_interrupt": 1169, "env.has_error_code": 1172,
    "env.sipi_vector": 1173, "env.mcg_cap": 1177, "env.mcg_status": 1185, "env.mcg_ctl": 1193,
    "env.mce_banks": 1201, "env.tsc_aux": 1521, "env.system_time_msr": 1529, "env.wall_clock_msr": 1537,
    "env.xcr0": 1545, "env.xstate_bv": 1553, "env.xmm_regs[1]": 1561,
}  # fmt: skip


def through_the_wire(values: Values) -> Values:
    return decode(CPU_DESCRIPTION, BytesSource(encode(CPU_DESCRIPTION, values)), 12)


def test_sizes_and_offsets() -> None:
    reset = reset_values(0x60FB1)
    assert len(encode(CPU_DESCRIPTION, reset)) == 1817 + 34
    without = {name: value for name, value in reset.items() if not name.startswith("cpu/")}
    assert len(encode(CPU_DESCRIPTION, without)) == 1817
    for name, offset in OFFSETS.items():
        index = [field.name for field in CPU_DESCRIPTION.fields].index(name)
        front = Description("front", 12, 12, CPU_DESCRIPTION.fields[:index])
        assert len(encode(front, without)) == offset, name
    assert len(encode(CPU_COMMON_DESCRIPTION, {"halted": 0, "interrupt_request": 0})) == 8


def test_reset_gives_the_reset_values(box: Box) -> None:
    assert box.engine.get_cpu_state() == reset_values(CpuModel().cpuid_version)


@pytest.mark.parametrize(
    "change",
    [
        {"env.fpregs_format_vmstate": 1},
        {"env.hflags": 0x40 | 1 << 19},  # SMM
        {"env.hflags": 0xB0 | 1 << 14, "env.efer": 0x500},  # LMA without paging
        {"env.hflags": 0xB0 | 1 << 15},  # CS64 without LMA
    ],
)
def test_a_state_that_cannot_be_had_changes_nothing(box: Box, change: Values) -> None:
    before = box.engine.get_cpu_state()
    with pytest.raises(VMStateError):
        box.engine.set_cpu_state(before | {"env.eip": 5} | change)
    assert box.engine.get_cpu_state() == before


# What a load derives or fixes, as QEMU's does: hflags get CPL from SS and IOBPT from DR7.
def normal(values: Values) -> Values:
    ss_dpl = values["env.segs"][2]["flags"] >> 13 & 3
    values["env.hflags"] = values["env.hflags"] & ~(3 | 1 << 14 | 1 << 15 | 1 << 19 | 1 << 24) | ss_dpl
    values["env.dr"][7] = 0x400
    for register in values["env.fpregs"]:
        register["exp"] &= 0xFFFF
    values["env.fpregs_format_vmstate"] = 0
    values["env.fptag_vmstate"] &= 0xFF
    values["env.eflags"] &= 0xFFFFFFFF
    return values


SHARED = Engine()


@given(st.integers(0, 1 << 32))
def test_any_state_survives_set_and_get(seed: int) -> None:
    body = BytesSource(random.Random(seed).randbytes(1817))
    values = normal(decode(CPU_DESCRIPTION, body, 12)) | {"cpu/poll_control_msr": {"env.poll_control_msr": 1}}
    SHARED.set_cpu_state(through_the_wire(values))
    assert SHARED.get_cpu_state() == values


def test_subsections_are_kept(box: Box) -> None:
    extra = {
        "cpu/fpop_ip_dp": {"env.fpop": 1, "env.fpip": 2, "env.fpdp": 3},
        "cpu/msr_ia32_misc_enable": {"env.msr_ia32_misc_enable": 0x41},
        "cpu/tsc_khz": {"env.tsc_khz": 2_000_000},
    }
    box.engine.set_cpu_state(through_the_wire(box.engine.get_cpu_state() | extra))
    state = box.engine.get_cpu_state()
    assert {name: state[name] for name in extra} == extra
    box.engine.reset()
    assert set(box.engine.get_cpu_state()) & set(extra) == set()
    assert box.engine.get_cpu_state()["cpu/poll_control_msr"] == KEPT["cpu/poll_control_msr"]


# Guests that carry state in x87, SSE, hidden segment parts and flags. The latch is in the middle; the rest of
# the computation, in another engine, must give what one engine gives alone.
WORK = {
    16: """
        movw $0x1234, %ax; movw %ax, %es; fldpi; fld1; fldl2e; stc; std
        outb %al, $0xf4; jmp 1f
    1:  setc %cl; fmulp; faddp; fstpt 0x6000; pushfw; popw %bx; movw %es:(0), %dx; cld; hlt
    """,
    32: """
        fldpi; fld1; fldl2e; fptan; pcmpeqd %xmm5, %xmm5; pshufd $0x1b, %xmm5, %xmm4
        movw $0x18, %ax; movw %ax, %gs; movl $0, 0x518; movl $0, 0x51c; movl $-1, %eax; addl $1, %eax
        outb %al, $0xf4; jmp 1f
    1:  setz %bl; pushfl; popl %ecx; movl %gs:4, %ebp; faddp; fstpt 0x6000; movdqu %xmm4, 0x6010; hlt
    """,
    64: """
        fldpi; fld1; fldl2e; fptan; movq $0x123456789abcdef0, %r8; movq %r8, %xmm15
        pshufd $0x1b, %xmm15, %xmm14
        movl $0xc0000100, %ecx; movl $0x6200, %eax; xorl %edx, %edx; wrmsr; movl $0x5a5a5a5a, 0x6208
        movl $0x9fc0, 0x6100; ldmxcsr 0x6100; movl $-1, %eax; addl $1, %eax; std
        outb %al, $0xf4; jmp 1f
    1:  setz %r10b; setc %r11b; pushfq; popq %rbx; cld; faddp; fmulp; fstpt 0x6000; fnstsw %ax
        movzwl %ax, %r12d; stmxcsr 0x6104; movdqu %xmm14, 0x6110; movl %fs:8, %ebp; movq %cs, %r13; hlt
    """,
}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_journey_in_mid_computation_is_bit_exact(box: Box, another_box: Box, bits: int) -> None:
    state = box.load(WORK[bits], bits)
    if bits == 32:  # GS: a descriptor that is gone from the GDT when the state travels; base 0x6300, 64 KiB
        box.put(0x518, (0x0000930063000000 | 0xFFFF).to_bytes(8, "little"))
        box.put(0x6304, b"\x11\x22\x33\x44")
        state["env.gdt"]["limit"] = 0x1F
        state["env.cr[4]"] = 0x600
        state["env.hflags"] |= 1 << 22
        box.engine.set_cpu_state(state)
    box.run_to_latch()
    middle = box.engine.get_cpu_state()
    another_box.ram[:] = box.ram[:]
    another_box.engine.set_cpu_state(through_the_wire(middle))
    assert another_box.engine.get_cpu_state() == middle
    for each in (box, another_box):
        assert each.run().reason is ExitReason.HALTED
    assert another_box.engine.get_cpu_state() == box.engine.get_cpu_state()
    assert another_box.ram[:] == box.ram[:]
    final = box.engine.get_cpu_state()["env.regs"]
    if bits == 32:
        assert final[5] == 0x44332211, "the hidden base of GS"
    if bits == 64:
        assert (final[10], final[5], final[13]) == (1, 0x5A5A5A5A, 8)
        assert final[3] & 0x441 == 0x441, "ZF, CF and DF"


def test_a_loop_hops_between_engines_at_arbitrary_instants(box: Box, another_box: Box) -> None:
    text = """
        movl $3000, %ecx; fldpi; xorl %edx, %edx
    1:  fld1; faddp; imull $1103515245, %eax, %eax; addl $12345, %eax; adcl $0, %edx; rorl $3, %eax
        xorl %eax, 0x6000
        outb %al, $0x80; decl %ecx; jnz 1b; fstpt 0x6010; hlt
    """
    box.load(text, 32)
    box.run()
    alone = box.engine.get_cpu_state()["env.regs"], box.ram[0x6000:0x6020]

    boxes, count, state = [box, another_box], 0, box.load(text, 32)
    box.put(0x6000, bytes(32))
    while True:
        here, there = boxes[count % 2], boxes[(count + 1) % 2]

        def stop_after_some(port: int, size: int, value: int, here: Box = here) -> None:
            if value % 16 == 0:
                here.engine.request_stop()

        here.engine.set_port_handlers(lambda port, size: 0, stop_after_some)
        if here.run().reason is ExitReason.HALTED:
            break
        state = through_the_wire(here.engine.get_cpu_state())
        there.engine.set_cpu_state(state)
        there.ram[:] = here.ram[:]
        count += 1
    assert count > 50
    assert (here.engine.get_cpu_state()["env.regs"], here.ram[0x6000:0x6020]) == alone


def test_a_guest_breakpoint_register_travels(box: Box, another_box: Box) -> None:
    box.put(4, b"\x00\x10\x00\x00")  # #DB in the real mode vector table
    text = "outb %al, $0xf4; jmp 1f; 1: nop; target: incw %bx; incw %bx; hlt"
    state = box.load(text, 16)
    state["env.dr"][0] = state["env.eip"] + 5
    state["env.dr"][7] = 0x402
    for each in (box, another_box):
        each.engine.set_cpu_state(state)
        each.put(0x1000, b"\xb9\x01\x00\xf4")  # mov $1, %cx; hlt
    box.run_to_latch()
    another_box.ram[:] = box.ram[:]
    another_box.engine.set_cpu_state(through_the_wire(box.engine.get_cpu_state()))
    assert another_box.engine.get_cpu_state()["env.dr"] == box.engine.get_cpu_state()["env.dr"]
    assert another_box.run().reason is ExitReason.HALTED
    assert another_box.regs()[1] == 1
    assert another_box.regs()[3] == 0
