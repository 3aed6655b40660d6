"""Puts a boot image into guest RAM and gives the CPU's first state: the ABI of our guests.

    guest physical      what
    0x00500             GDT: null, code (0x08), data (0x10)
    0x07000             top of the stack
    0x07c00             a boot sector, entered in real mode at 0:7c00, DL=0x80, SP=0x7c00
    0x09000..0x0efff    page tables: the first 4 GiB mapped one to one in pages of 2 MiB (ELF64)
    0x20000             the text of -append, NUL-terminated, at most 4095 bytes and the NUL

An ELF32 file is entered in flat protected mode without paging, EBX = 0x20000. An ELF64 file is entered in
long mode with those page tables, RSI = 0x20000. Interrupts are off.

Rules: a file is read and checked whole before a byte of RAM is written; every range is checked against the
memory map; RAM is written through `GuestRam` only.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

from vmm.boot.elf import ElfImage, Segment, parse_elf
from vmm.errors import BootError
from vmm.ram import GuestRam
from vmm.vmstate import Values

__all__ = ["BootImage", "read_boot_sector", "read_kernel"]

GDT_ADDRESS = 0x500
STACK_TOP = 0x7000
BOOT_SECTOR_ADDRESS = 0x7C00
PAGE_TABLES = 0x9000
PARAMETERS_ADDRESS = 0x20000
PARAMETERS_BYTES = 4096
SECTOR_BYTES = 512
FILE_LIMIT_BYTES = 1 << 30
FIRST_DISK = 0x80

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
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
ES, CS, SS, DS, FS, GS = range(6)
RDX, RBX, RSP, RSI = 2, 3, 4, 6
PTE_PRESENT_WRITABLE, PTE_HUGE = 0x3, 0x80


@dataclass(frozen=True)
class BootImage:
    """A checked image. `load` may be repeated: a reset loads it again."""

    name: str
    segments: tuple[Segment, ...]
    parameters: bytes
    mode: str  # "real" | "protected" | "long"
    entry: int

    def check(self, ram: GuestRam) -> None:
        """Raises BootError if a piece of the image lies where there is no RAM."""
        for piece in self._pieces():
            if not _is_ram(ram, piece.guest_address, piece.length):
                needed = f"{piece.length:#x} bytes at {piece.guest_address:#x}"
                size = f"the guest has {ram.length_bytes:#x} bytes"
                raise BootError(f"{self.name}: Does not fit into guest RAM: needs {needed}, {size}")

    def load(self, ram: GuestRam) -> None:
        """Write it. May wait for pages that are still at a migration source.

        Raises BootError as `check`; then nothing was written.
        """
        self.check(ram)
        for piece in self._pieces():
            ram.write(piece.guest_address, piece.data, may_wait=True)
            _clear(ram, piece.guest_address + len(piece.data), piece.length - len(piece.data))

    def _pieces(self) -> list[Segment]:
        pieces = [*self.segments, Segment(PARAMETERS_ADDRESS, self.parameters, len(self.parameters))]
        if self.mode != "real":
            pieces += [_gdt(self.mode), *(_page_tables() if self.mode == "long" else ())]
        return pieces

    def first_state(self, reset: Values) -> Values:
        """The CPU as it enters the image, made of its state after a `reset` (names of CPU_DESCRIPTION)."""
        values = dict(reset)
        regs = [0] * 16
        regs[RSP] = BOOT_SECTOR_ADDRESS if self.mode == "real" else STACK_TOP
        if self.mode == "real":
            regs[RDX] = FIRST_DISK
        else:
            regs[RBX if self.mode == "protected" else RSI] = PARAMETERS_ADDRESS
        values["env.regs"] = regs
        values["env.eip"] = self.entry
        values["env.eflags"] = 0x2
        values.update(_REAL if self.mode == "real" else _mode_state(self.mode))
        return values


def read_kernel(path: str, append: str) -> BootImage:
    """-kernel. Raises BootError."""
    image: ElfImage = parse_elf(_read(path, FILE_LIMIT_BYTES), path)
    mode = "long" if image.is_64bit else "protected"
    return BootImage(path, image.segments, _parameters(append), mode, image.entry)


def read_boot_sector(path: str, append: str) -> BootImage:
    """-drive: the first sector, which must end in 55 aa. Raises BootError."""
    sector = _read(path, SECTOR_BYTES)
    if len(sector) < SECTOR_BYTES or sector[-2:] != b"\x55\xaa":
        raise BootError(f"{path}: Not bootable: expected {SECTOR_BYTES} bytes that end in 55 aa")
    segment = Segment(BOOT_SECTOR_ADDRESS, sector, SECTOR_BYTES)
    return BootImage(path, (segment,), _parameters(append), "real", BOOT_SECTOR_ADDRESS)


def _read(path: str, limit: int) -> bytes:
    try:
        # A FIFO or a device must neither block us nor flow for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(limit) or b""
    except OSError as error:
        raise BootError(f"Could not open '{path}': {error.strerror}") from error


def _parameters(append: str) -> bytes:
    return append.encode("utf-8", "surrogateescape")[: PARAMETERS_BYTES - 1] + b"\0"


def _is_ram(ram: GuestRam, address: int, length: int) -> bool:
    end = address + length
    for region in ram.map:
        if region.guest_address <= address < region.guest_address + region.length:
            address = min(end, region.guest_address + region.length)
    return address == end


def _clear(ram: GuestRam, address: int, length: int) -> None:
    for region in ram.map:
        first = max(address, region.guest_address)
        end = min(address + length, region.guest_address + region.length)
        if first < end:
            region.block.fill(region.offset + first - region.guest_address, end - first, 0, may_wait=True)


def _gdt(mode: str) -> Segment:
    data = struct.pack("<QQQ", 0, CODE64 if mode == "long" else CODE32, DATA)
    return Segment(GDT_ADDRESS, data, len(data))


def _page_tables() -> tuple[Segment, Segment]:
    """PML4 and PDPT at PAGE_TABLES, then four page directories."""
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


_REAL: dict[str, Any] = {
    "env.segs": [
        {"selector": 0, "base": 0, "limit": 0xFFFF, "flags": 0x9B00 if index == CS else 0x9300}
        for index in range(6)
    ],
    "env.hflags": HF_ADDSEG,
}


def _mode_state(mode: str) -> dict[str, Any]:
    is_long = mode == "long"
    code = _segment(CODE64 if is_long else CODE32, CODE_SELECTOR)
    data = _segment(DATA, DATA_SELECTOR)
    none = {"selector": 0, "base": 0, "limit": 0xFFFF}
    state: dict[str, Any] = {
        "env.segs": [dict(code if index == CS else data) for index in range(6)],
        "env.ldt": {**none, "flags": LDT_FLAGS},
        "env.tr": {**none, "flags": TSS_FLAGS},
        "env.gdt": {"selector": 0, "base": GDT_ADDRESS, "limit": 3 * 8 - 1, "flags": 0},
        "env.idt": {"selector": 0, "base": 0, "limit": 0, "flags": 0},
        "env.cr[0]": CR0_PE | CR0_MP | CR0_ET | CR0_NE,
        "env.cr[4]": CR4_OSFXSR | CR4_OSXMMEXCPT,
        "env.hflags": HF_CS32 | HF_SS32 | HF_PE | HF_MP | HF_OSFXSR,
    }
    if is_long:
        state["env.cr[0]"] |= CR0_WP | CR0_PG
        state["env.cr[3]"] = PAGE_TABLES
        state["env.cr[4]"] |= CR4_PAE
        state["env.efer"] = EFER_LME | EFER_LMA
        state["env.hflags"] = HF_SS32 | HF_PE | HF_MP | HF_LMA | HF_CS64 | HF_OSFXSR | HF_CS32
    return state
