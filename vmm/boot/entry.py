"""How a boot image finds the CPU: page tables, flat segments, and the state of each mode's entry."""

from __future__ import annotations

import struct
from typing import Any

from vmm.boot.elf import Segment
from vmm.vmstate import Values

__all__ = ["PAGE_TABLES", "REAL_STATE", "long_mode_state", "page_tables", "protected_mode_state"]

PAGE_TABLES = 0x9000
CODE32 = 0x00CF9B000000FFFF
CODE64 = 0x00AF9B000000FFFF
DATA = 0x00CF93000000FFFF
LDT_FLAGS, TSS_FLAGS = 0x8200, 0x8B00

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 0x1, 0x2, 0x10, 0x20, 0x10000, 0x80000000
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 0x20, 0x200, 0x400
EFER_LME, EFER_LMA = 0x100, 0x400
# hflags, target/i386/cpu.h: what the translator needs to know of the mode
HF_CS32, HF_SS32, HF_ADDSEG, HF_PE, HF_MP = 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 9
HF_LMA, HF_CS64, HF_OSFXSR = 1 << 14, 1 << 15, 1 << 22
CS = 1
PTE_PRESENT_WRITABLE, PTE_HUGE = 0x3, 0x80


def page_tables() -> tuple[Segment, Segment]:
    """PML4 and PDPT at PAGE_TABLES, then four page directories: the first 4 GiB one to one."""
    pdpt, directories = PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000
    tops = struct.pack("<512Q", pdpt | PTE_PRESENT_WRITABLE, *[0] * 511)
    gigabytes = [directories + 0x1000 * index | PTE_PRESENT_WRITABLE for index in range(4)]
    tops += struct.pack("<512Q", *gigabytes, *[0] * 508)
    leaves = [number << 21 | PTE_HUGE | PTE_PRESENT_WRITABLE for number in range(4 * 512)]
    packed = struct.pack("<2048Q", *leaves)
    return Segment(PAGE_TABLES, tops, len(tops)), Segment(directories, packed, len(packed))


def _segment(descriptor: int, selector: int) -> Values:
    """The hidden parts of a segment register that was loaded from a flat descriptor."""
    return {"selector": selector, "base": 0, "limit": 0xFFFFFFFF, "flags": descriptor >> 32}


REAL_STATE: dict[str, Any] = {
    "env.segs": [
        {"selector": 0, "base": 0, "limit": 0xFFFF, "flags": 0x9B00 if index == CS else 0x9300}
        for index in range(6)
    ],
    "env.hflags": HF_ADDSEG,
}


def protected_mode_state(code: int, data: int, gdt_address: int, descriptors: int) -> dict[str, Any]:
    """Flat 32-bit protected mode without paging; `code` and `data` are selectors."""
    return _flat_state(_segment(CODE32, code), _segment(DATA, data), gdt_address, descriptors)


def long_mode_state(code: int, data: int, gdt_address: int, descriptors: int) -> dict[str, Any]:
    """64-bit mode with the page tables of `page_tables`."""
    state = _flat_state(_segment(CODE64, code), _segment(DATA, data), gdt_address, descriptors)
    state["env.cr[0]"] |= CR0_WP | CR0_PG
    state["env.cr[3]"] = PAGE_TABLES
    state["env.cr[4]"] |= CR4_PAE
    state["env.efer"] = EFER_LME | EFER_LMA
    state["env.hflags"] = HF_SS32 | HF_PE | HF_MP | HF_LMA | HF_CS64 | HF_OSFXSR | HF_CS32
    return state


def _flat_state(code: Values, data: Values, gdt_address: int, descriptors: int) -> dict[str, Any]:
    none = {"selector": 0, "base": 0, "limit": 0xFFFF}
    return {
        "env.segs": [dict(code if index == CS else data) for index in range(6)],
        "env.ldt": {**none, "flags": LDT_FLAGS},
        "env.tr": {**none, "flags": TSS_FLAGS},
        "env.gdt": {"selector": 0, "base": gdt_address, "limit": descriptors * 8 - 1, "flags": 0},
        "env.idt": {"selector": 0, "base": 0, "limit": 0, "flags": 0},
        "env.cr[0]": CR0_PE | CR0_MP | CR0_ET | CR0_NE,
        "env.cr[4]": CR4_OSFXSR | CR4_OSXMMEXCPT,
        "env.hflags": HF_CS32 | HF_SS32 | HF_PE | HF_MP | HF_OSFXSR,
    }
