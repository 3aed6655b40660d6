"""The head of an ELF core file of a machine, as QEMU's dump-guest-memory writes it. Pure.

    Ehdr | Phdr PT_NOTE | Phdr PT_LOAD for each region of RAM | CORE NT_PRSTATUS | QEMU 0 | RAM

Physical and virtual addresses of a PT_LOAD are the guest's physical ones (paging=false). NT_PRSTATUS is in
the layout of i386 until the CPU is in long mode, then in that of x86-64; debuggers read it. The note QEMU has
the whole of what a debugger of kernels needs: segments with their bases, control registers.

Sources: System V ABI, "Object Files"; QEMU 7.2 docs and the bytes of its core files.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmm.vmstate import Values

__all__ = ["core_head"]

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
NOTE = struct.Struct("<III")
IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
ET_CORE, EM_386, EM_X86_64 = 4, 3, 62
PT_LOAD, PT_NOTE = 1, 4
NT_PRSTATUS, NT_QEMU = 1, 0
EFER_LMA = 1 << 10
THREAD = 1
"""The number of the CPU as a thread, as QEMU counts."""
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)
REGISTERS = (RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, *range(8, 16))
QEMU_VERSION, QEMU_BYTES = 1, 440


def core_head(cpu: Values, regions: Sequence[tuple[int, int]]) -> bytes:
    """Everything before RAM, whose `regions` (guest physical address, length) follow without a gap.

    `cpu` has the names of CPU_DESCRIPTION.
    """
    is_long = bool(cpu["env.efer"] & EFER_LMA)
    status = _prstatus_64(cpu) if is_long else _prstatus_32(cpu)
    notes = _note(b"CORE", NT_PRSTATUS, status) + _note(b"QEMU", NT_QEMU, _qemu_state(cpu))
    count = 1 + len(regions)
    notes_at = EHDR.size + count * PHDR.size
    machine = EM_X86_64 if is_long else EM_386
    head = EHDR.pack(IDENT, ET_CORE, machine, 1, 0, EHDR.size, 0, 0, EHDR.size, PHDR.size, count, 0, 0, 0)
    head += PHDR.pack(PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 0)
    offset = notes_at + len(notes)
    for address, length in regions:
        head += PHDR.pack(PT_LOAD, 0, offset, address, address, length, length, 0)
        offset += length
    return head + notes


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    padded = (name + b"\0").ljust(8, b"\0")
    return NOTE.pack(len(name) + 1, len(data), kind) + padded + data.ljust((len(data) + 3) & ~3, b"\0")


def _selectors(cpu: Values, *segments: int) -> list[int]:
    return [cpu["env.segs"][each]["selector"] & 0xFFFF for each in segments]


def _prstatus_64(cpu: Values) -> bytes:
    """struct elf_prstatus of Linux on x86-64: the thread's number at 32, user_regs_struct at 112."""
    regs, segs = cpu["env.regs"], cpu["env.segs"]
    (cs, ss, ds, es, fs, gs) = _selectors(cpu, CS, SS, DS, ES, FS, GS)
    values = (
        *(regs[each] for each in (15, 14, 13, 12, RBP, RBX, 11, 10, 9, 8, RAX, RCX, RDX, RSI, RDI)),
        *(0, cpu["env.eip"], cs, cpu["env.eflags"], regs[RSP], ss),
        *(segs[FS]["base"], segs[GS]["base"], ds, es, fs, gs),
    )
    return struct.pack("<32xI76x27Q8x", THREAD, *values)


def _prstatus_32(cpu: Values) -> bytes:
    """struct elf_prstatus of Linux on i386: the thread's number at 24, user_regs_struct at 72."""
    low = [value & 0xFFFF_FFFF for value in cpu["env.regs"][:8]]
    general = [low[each] for each in (RBX, RCX, RDX, RSI, RDI, RBP, RAX)]
    (cs, ss, *data) = _selectors(cpu, CS, SS, DS, ES, FS, GS)
    eip, flags = cpu["env.eip"] & 0xFFFF_FFFF, cpu["env.eflags"] & 0xFFFF_FFFF
    rest = (*data, 0, eip, cs, flags, low[RSP], ss)
    return struct.pack("<24xI44x17I4x", THREAD, *general, *rest)


def _qemu_state(cpu: Values) -> bytes:
    """QEMUCPUState, version 1."""
    segs = cpu["env.segs"]
    tables = [segs[each] for each in (CS, DS, ES, FS, GS, SS)]
    tables += [cpu[f"env.{name}"] for name in ("ldt", "tr", "gdt", "idt")]
    regs = [cpu["env.regs"][each] for each in REGISTERS]
    state = struct.pack("<II18Q", QEMU_VERSION, QEMU_BYTES, *regs, cpu["env.eip"], cpu["env.eflags"])
    for each in tables:
        state += struct.pack("<IIIIQ", each["selector"], each["limit"], each["flags"], 0, each["base"])
    control = (cpu["env.cr[0]"], 0, cpu["env.cr[2]"], cpu["env.cr[3]"], cpu["env.cr[4]"])
    return state + struct.pack("<6Q", *control, cpu["env.kernelgsbase"])
