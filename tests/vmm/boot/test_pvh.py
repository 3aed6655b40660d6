"""Kernels by the PVH ABI: the note that says so, and what the kernel finds."""

from __future__ import annotations

import pathlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.boot.acpi import AcpiConfig
from vmm.boot.elf import parse_elf
from vmm.boot.loader import BootImage, read_kernel
from vmm.boot.pvh import PvhImage
from vmm.errors import BootError
from vmm.ram import GuestRam, RAMBlock

MIB = 1 << 20
KERNEL_AT = 2 * MIB
NOTE = struct.pack("<III4sII", 4, 4, 18, b"Xen\0", KERNEL_AT + 8, 0)[:-4]
OTHER = struct.pack("<III4s8s", 4, 7, 1, b"GNU\0", b"1234567")


def elf64(notes: bytes) -> bytes:
    """A file of one segment, with notes."""
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, KERNEL_AT, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    note = struct.pack("<IIQQQQQQ", 4, 4, 176, 0, 0, len(notes), len(notes), 4)
    load = struct.pack("<IIQQQQQQ", 1, 7, 176 + len(notes), 0, KERNEL_AT, 4, 4096, 0)
    return ident + header + note + load + notes + b"CODE"


@pytest.mark.parametrize(
    ("notes", "entry"),
    [
        (NOTE, KERNEL_AT + 8),
        (OTHER + NOTE, KERNEL_AT + 8),
        (OTHER, None),
        (b"", None),
        (NOTE[:-1], None),
        (struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", KERNEL_AT), KERNEL_AT),
        (struct.pack("<III4sI", 4, 4, 18, b"Xem\0", KERNEL_AT), None),
        (struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 18), None),
    ],
)
def test_the_note(notes: bytes, entry: int | None) -> None:
    assert parse_elf(elf64(notes), "f").pvh_entry == entry


@given(st.binary(max_size=80))
def test_any_notes_are_read_or_passed_over(notes: bytes) -> None:
    parse_elf(elf64(notes), "f")


def test_what_the_kernel_finds(tmp_path: pathlib.Path) -> None:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(elf64(NOTE))
    initrd.write_bytes(b"I" * 5000)
    image = read_kernel(str(kernel), "console=ttyS0", str(initrd), AcpiConfig(0x600, 14))
    assert isinstance(image, PvhImage)
    ram = GuestRam([RAMBlock("ram", 4 * MIB)])
    image.load(ram)
    state = image.first_state({})
    assert state["env.eip"] == KERNEL_AT + 8
    start = state["env.regs"][3]
    magic, version, _, modules, module_at, line_at, rsdp, map_at, entries, _ = struct.unpack(
        "<IIIIQQQQII", ram.read(start, 56)
    )
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert ram.read(line_at, 14) == b"console=ttyS0\0"
    at, length = struct.unpack("<QQ", ram.read(module_at, 16))
    assert (at % 4096, ram.read(at, length)) == (0, b"I" * 5000)
    assert ram.read(rsdp, 8) == b"RSD PTR "
    last = struct.unpack("<QQII", ram.read(map_at + 24 * (entries - 1), 24))
    assert last == (MIB, 3 * MIB, 1, 0)
    assert ram.read(KERNEL_AT, 5) == b"CODE\0"


def test_an_initrd_that_does_not_fit(tmp_path: pathlib.Path) -> None:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(elf64(NOTE))
    initrd.write_bytes(bytes(3 * MIB))
    image = read_kernel(str(kernel), "", str(initrd))
    with pytest.raises(BootError, match="Does not fit into guest RAM"):
        image.check(GuestRam([RAMBlock("ram", 4 * MIB)]))


def test_without_the_note_the_abi_of_our_guests_is_used(tmp_path: pathlib.Path) -> None:
    kernel = tmp_path / "guest"
    kernel.write_bytes(elf64(OTHER))
    assert isinstance(read_kernel(str(kernel), ""), BootImage)
    with pytest.raises(BootError, match="-initrd goes with"):
        read_kernel(str(kernel), "", str(kernel))
