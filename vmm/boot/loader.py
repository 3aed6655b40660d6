"""Puts a boot image into guest RAM and gives the CPU's first state: the ABI of our guests.

    guest physical      what
    0x00500             GDT: null, code (0x08), data (0x10)
    0x07000             top of the stack
    0x07c00             a boot sector, entered in real mode at 0:7c00, DL=0x80, SP=0x7c00
    0x09000..0x0efff    page tables: the first 4 GiB mapped one to one in pages of 2 MiB (ELF64)
    0x20000             the text of -append, NUL-terminated, at most 4095 bytes and the NUL

A file with a PVH note is entered by that ABI (`pvh.py`). Any other ELF32 file is entered in flat protected
mode without paging, EBX = 0x20000; an ELF64 file in long mode with those page tables, RSI = 0x20000.
Interrupts are off.

Rules: a file is read and checked whole before a byte of RAM is written; every range is checked against the
memory map; RAM is written through `GuestRam` only.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from vmm.boot.acpi import AcpiConfig
from vmm.boot.elf import ElfImage, Segment, parse_elf
from vmm.boot.entry import (
    CODE32,
    CODE64,
    DATA,
    REAL_STATE,
    long_mode_state,
    page_tables,
    protected_mode_state,
)
from vmm.boot.linux import LinuxImage, is_bzimage, parse_bzimage
from vmm.boot.pieces import PiecesImage
from vmm.boot.pvh import PvhImage
from vmm.errors import BootError
from vmm.ram import GuestRam
from vmm.vmstate import Values

__all__ = ["BootImage", "Image", "read_boot_sector", "read_kernel"]

GDT_ADDRESS = 0x500
STACK_TOP = 0x7000
BOOT_SECTOR_ADDRESS = 0x7C00
PARAMETERS_ADDRESS = 0x20000
PARAMETERS_BYTES = 4096
SECTOR_BYTES = 512
FILE_LIMIT_BYTES = 1 << 30
FIRST_DISK = 0x80

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
RDX, RBX, RSP, RSI = 2, 3, 4, 6


@dataclass(frozen=True)
class BootImage(PiecesImage):
    """A checked image. `load` may be repeated: a reset loads it again."""

    name: str
    segments: tuple[Segment, ...]
    parameters: bytes
    mode: str  # "real" | "protected" | "long"
    entry: int

    def _pieces(self, ram: GuestRam) -> list[Segment]:
        pieces = [*self.segments, Segment(PARAMETERS_ADDRESS, self.parameters, len(self.parameters))]
        if self.mode != "real":
            pieces += [_gdt(self.mode), *(page_tables() if self.mode == "long" else ())]
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
        if self.mode == "real":
            values.update(REAL_STATE)
        else:
            enter = long_mode_state if self.mode == "long" else protected_mode_state
            values.update(enter(CODE_SELECTOR, DATA_SELECTOR, GDT_ADDRESS, 3))
        return values


Image = BootImage | LinuxImage | PvhImage


def read_kernel(path: str, append: str, initrd: str | None = None, acpi: AcpiConfig | None = None) -> Image:
    """-kernel: a Linux bzImage, or an ELF file. Kernels by other ABIs than ours get ACPI tables.

    Raises BootError.
    """
    data = _read(path, FILE_LIMIT_BYTES)
    disk = _read(initrd, FILE_LIMIT_BYTES) if initrd is not None else b""
    if is_bzimage(data):
        return parse_bzimage(data, path, append, disk, acpi)
    image: ElfImage = parse_elf(data, path)
    if image.pvh_entry is not None:
        return PvhImage(path, image, image.pvh_entry, _parameters(append), disk, acpi)
    if initrd is not None:
        raise BootError(f"{path}: -initrd goes with a Linux bzImage or an ELF file with a PVH note only")
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


def _gdt(mode: str) -> Segment:
    data = struct.pack("<QQQ", 0, CODE64 if mode == "long" else CODE32, DATA)
    return Segment(GDT_ADDRESS, data, len(data))
