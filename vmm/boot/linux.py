"""Boots a Linux bzImage as a boot loader does: the 64-bit boot protocol, no firmware.

    guest physical      what
    0x00500             GDT: null, unused, code (0x10), data (0x18)
    0x07000             boot_params ("zero page"): the setup header, the memory map, where the rest lies
    0x09000..0x0efff    page tables: the first 4 GiB mapped one to one in pages of 2 MiB
    0x20000             the command line
    0xe0000             ACPI tables (`acpi.py`)
    pref_address        the protected mode part of the image; entered at + 0x200 in long mode, RSI = 0x7000
    top of low RAM      the initial RAM disk, page aligned

Rules: as for every boot image (`loader.py`): read and checked whole before a byte of RAM is written.

Source: Linux Documentation/x86/boot.rst and zero-page.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.boot.acpi import AcpiConfig, acpi_tables
from vmm.boot.elf import Segment
from vmm.boot.entry import long_mode_state, page_tables
from vmm.boot.pieces import PiecesImage
from vmm.errors import BootError
from vmm.ram import GuestRam
from vmm.vmstate import Values

__all__ = ["COMMAND_LINE_ADDRESS", "LinuxImage", "is_bzimage", "memory_map", "parse_bzimage"]

GDT_ADDRESS = 0x500
BOOT_PARAMS_ADDRESS = 0x7000
COMMAND_LINE_ADDRESS = 0x20000
LOW_MEMORY_END = 0x9FC00
HIGH_MEMORY = 0x100000
ENTRY_64 = 0x200
PAGE = 4096

# Offsets in the image and in boot_params: Documentation/x86/boot.rst, "The Real-Mode Kernel Header"
HEADER = 0x1F1
ACPI_RSDP_ADDRESS = 0x070
MAGIC, VERSION = 0x202, 0x206
E820_COUNT, E820_TABLE, E820_ENTRY = 0x1E8, 0x2D0, 20
E820_RAM, E820_RESERVED = 1, 2
LOADED_HIGH, KEEP_SEGMENTS, CAN_USE_HEAP = 0x01, 0x40, 0x80
XLF_KERNEL_64 = 0x01
NEEDED_VERSION = 0x20C
UNDEFINED_LOADER = 0xFF
CODE_SELECTOR, DATA_SELECTOR = 0x10, 0x18
RSI, RSP = 6, 4


@dataclass(frozen=True)
class LinuxImage(PiecesImage):
    """A checked image. `load` may be repeated: a reset loads it again."""

    name: str
    header: bytes  # of the setup header, from HEADER on
    kernel: bytes
    address: int
    init_size: int
    initrd: bytes
    initrd_limit: int
    command_line: bytes
    acpi: AcpiConfig | None = None

    def _pieces(self, ram: GuestRam) -> list[Segment]:
        descriptors = struct.pack("<QQQQ", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
        initrd_at = self._initrd_address(ram)
        tables, rsdp = acpi_tables(self.acpi) if self.acpi is not None else (None, 0)
        params = self._boot_params(ram, initrd_at, rsdp)
        return [
            Segment(GDT_ADDRESS, descriptors, len(descriptors)),
            Segment(BOOT_PARAMS_ADDRESS, params, len(params)),
            *page_tables(),
            Segment(COMMAND_LINE_ADDRESS, self.command_line, len(self.command_line)),
            Segment(self.address, self.kernel, max(self.init_size, len(self.kernel))),
            *([Segment(initrd_at, self.initrd, len(self.initrd))] if self.initrd else ()),
            *([tables] if tables is not None else ()),
        ]

    def _initrd_address(self, ram: GuestRam) -> int:
        """As high as may be: the kernel unpacks itself from below."""
        low_end = max(
            region.guest_address + region.length for region in ram.map if region.guest_address < 1 << 32
        )
        address = (min(low_end, self.initrd_limit + 1) - len(self.initrd)) & -PAGE
        if self.initrd and address < self.address + self.init_size:
            needed = f"{self.init_size:#x} bytes at {self.address:#x} and an initrd of {len(self.initrd):#x}"
            raise BootError(
                f"{self.name}: Does not fit into guest RAM: needs {needed}, RAM ends at {low_end:#x}"
            )
        return address

    def _boot_params(self, ram: GuestRam, initrd_at: int, rsdp: int) -> bytes:
        params = bytearray(PAGE)
        struct.pack_into("<Q", params, ACPI_RSDP_ADDRESS, rsdp)
        params[HEADER : HEADER + len(self.header)] = self.header
        fields: list[tuple[int, str, int]] = [
            (0x1FA, "<H", 0xFFFF),  # vid_mode: normal
            (0x210, "<B", UNDEFINED_LOADER),
            (0x211, "<B", params[0x211] | LOADED_HIGH | KEEP_SEGMENTS | CAN_USE_HEAP),
            (0x214, "<I", self.address),
            (0x224, "<H", 0xFE00),  # heap_end_ptr
            (0x228, "<I", COMMAND_LINE_ADDRESS),
        ]
        if self.initrd:
            fields += [(0x218, "<I", initrd_at), (0x21C, "<I", len(self.initrd))]
        for offset, layout, value in fields:
            struct.pack_into(layout, params, offset, value)
        entries = memory_map(ram)
        params[E820_COUNT] = len(entries)
        for index, entry in enumerate(entries):
            struct.pack_into("<QQI", params, E820_TABLE + index * E820_ENTRY, *entry)
        return bytes(params)

    def first_state(self, reset: Values) -> Values:
        """The CPU as it enters the kernel, made of its state after a `reset` (names of CPU_DESCRIPTION)."""
        values = dict(reset)
        regs = [0] * 16
        regs[RSI], regs[RSP] = BOOT_PARAMS_ADDRESS, BOOT_PARAMS_ADDRESS
        values["env.regs"] = regs
        values["env.eip"] = self.address + ENTRY_64
        values["env.eflags"] = 0x2
        values.update(long_mode_state(CODE_SELECTOR, DATA_SELECTOR, GDT_ADDRESS, 4))
        return values


def memory_map(ram: GuestRam) -> list[tuple[int, int, int]]:
    """e820: (address, length, type)."""
    entries = [(0, LOW_MEMORY_END, E820_RAM), (LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, E820_RESERVED)]
    for region in ram.map:
        first = max(region.guest_address, HIGH_MEMORY)
        end = region.guest_address + region.length
        if first < end:
            entries.append((first, end - first, E820_RAM))
    return entries


def is_bzimage(data: bytes) -> bool:
    """Does the file have Linux's setup header?"""
    return data[MAGIC : MAGIC + 4] == b"HdrS"


def parse_bzimage(
    data: bytes, name: str, append: str, initrd: bytes, acpi: AcpiConfig | None = None
) -> LinuxImage:
    """Raises BootError for a kernel that cannot be entered in 64-bit mode, or a command line too long."""
    if len(data) < 0x270:
        raise BootError(f"{name}: The Linux image ends within its header")
    (version,) = struct.unpack_from("<H", data, VERSION)
    (xloadflags,) = struct.unpack_from("<H", data, 0x236)
    if version < NEEDED_VERSION or not xloadflags & XLF_KERNEL_64:
        raise BootError(
            f"{name}: Not a 64-bit Linux kernel: boot protocol {version >> 8}.{version & 0xFF:02}, "
            f"expected 2.12 or later with a 64-bit entry point"
        )
    (limit,) = struct.unpack_from("<I", data, 0x238)
    line = append.encode("utf-8", "surrogateescape") + b"\0"
    if len(line) > min(limit, PAGE * 8):
        raise BootError(f"{name}: The command line has {len(line) - 1} bytes, the kernel takes {limit - 1}")
    setup_sectors = data[HEADER] or 4
    start = (setup_sectors + 1) * 512
    address, init_size = struct.unpack_from("<QI", data, 0x258)
    (initrd_limit,) = struct.unpack_from("<I", data, 0x22C)
    if start + ENTRY_64 >= len(data):
        raise BootError(f"{name}: The Linux image is truncated: {len(data)} bytes")
    header = data[HEADER : 0x202 + data[0x201]]
    return LinuxImage(name, header, data[start:], address, init_size, initrd, initrd_limit, line, acpi)
