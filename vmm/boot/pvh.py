"""Boots a kernel by the x86/HVM direct boot ABI (PVH): an ELF file with the note XEN_ELFNOTE_PHYS32_ENTRY.

    guest physical      what
    0x00500             GDT: null, code (0x08), data (0x10)
    0x06000             hvm_start_info, then its list of modules, then its memory map
    0x20000             the command line
    p_paddr             the segments of the ELF file
    0xe0000             ACPI tables (`acpi.py`)
    top of low RAM      the initial RAM disk, page aligned: the only module

Entered in flat 32-bit protected mode without paging, EBX = hvm_start_info, interrupts off.

Sources: Xen docs/misc/pvh.pandoc, xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.boot.acpi import AcpiConfig, acpi_tables
from vmm.boot.elf import ElfImage, Segment
from vmm.boot.entry import CODE32, DATA, protected_mode_state
from vmm.boot.linux import COMMAND_LINE_ADDRESS, memory_map
from vmm.boot.pieces import PiecesImage
from vmm.errors import BootError
from vmm.ram import GuestRam
from vmm.vmstate import Values

__all__ = ["PvhImage"]

GDT_ADDRESS = 0x500
START_INFO_ADDRESS = 0x6000
MAGIC, VERSION = 0x336EC578, 1
START_INFO = struct.Struct("<IIIIQQQQII")
MODULE = struct.Struct("<QQQQ")
MEMORY = struct.Struct("<QQII")
CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
RBX = 3
PAGE = 4096


@dataclass(frozen=True)
class PvhImage(PiecesImage):
    """A checked image. `load` may be repeated: a reset loads it again."""

    name: str
    elf: ElfImage
    entry: int
    command_line: bytes
    initrd: bytes = b""
    acpi: AcpiConfig | None = None

    def _pieces(self, ram: GuestRam) -> list[Segment]:
        pieces = [_whole(GDT_ADDRESS, struct.pack("<QQQ", 0, CODE32, DATA))]
        pieces += [_whole(COMMAND_LINE_ADDRESS, self.command_line), *self.elf.segments]
        rsdp = 0
        if self.acpi is not None:
            tables, rsdp = acpi_tables(self.acpi)
            pieces.append(tables)
        initrd_at = self._initrd_address(ram)
        if self.initrd:
            pieces.append(_whole(initrd_at, self.initrd))
        pieces.append(_whole(START_INFO_ADDRESS, self._start_info(ram, initrd_at, rsdp)))
        return pieces

    def _initrd_address(self, ram: GuestRam) -> int:
        low_end = max(
            region.guest_address + region.length for region in ram.map if region.guest_address < 1 << 32
        )
        address = (min(low_end, 1 << 32) - len(self.initrd)) & -PAGE
        kernel_end = max(segment.guest_address + segment.length for segment in self.elf.segments)
        if self.initrd and address < kernel_end:
            needed = f"{kernel_end:#x} bytes and an initrd of {len(self.initrd):#x}"
            raise BootError(
                f"{self.name}: Does not fit into guest RAM: needs {needed}, RAM ends at {low_end:#x}"
            )
        return address

    def _start_info(self, ram: GuestRam, initrd_at: int, rsdp: int) -> bytes:
        modules_at = START_INFO_ADDRESS + START_INFO.size
        modules = MODULE.pack(initrd_at, len(self.initrd), 0, 0) if self.initrd else b""
        entries = memory_map(ram)
        memory = b"".join(MEMORY.pack(*entry, 0) for entry in entries)
        start = START_INFO.pack(
            MAGIC, VERSION, 0, int(bool(modules)), modules_at, COMMAND_LINE_ADDRESS, rsdp,
            modules_at + len(modules), len(entries), 0,
        )  # fmt: skip
        return start + modules + memory

    def first_state(self, reset: Values) -> Values:
        """The CPU as it enters the kernel, made of its state after a `reset` (names of CPU_DESCRIPTION)."""
        values = dict(reset)
        values["env.regs"] = [START_INFO_ADDRESS if index == RBX else 0 for index in range(16)]
        values["env.eip"] = self.entry
        values["env.eflags"] = 0x2
        values.update(protected_mode_state(CODE_SELECTOR, DATA_SELECTOR, GDT_ADDRESS, 3))
        return values


def _whole(address: int, data: bytes) -> Segment:
    return Segment(address, data, len(data))
