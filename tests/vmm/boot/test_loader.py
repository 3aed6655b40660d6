"""The loader: what lies where in RAM, the CPU's first state, and images that do not fit."""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Iterator

import pytest

from vmm.boot.elf import Segment
from vmm.boot.loader import BootImage, read_boot_sector, read_kernel
from vmm.cpu.state import CPU_DESCRIPTION
from vmm.errors import BootError
from vmm.ram import MICROVM_HOLE, GuestRam, RAMBlock
from vmm.vmstate import blank

MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    ram = GuestRam([RAMBlock("ram", MIB)])
    yield ram
    ram.close()


def image(mode: str = "protected", segment: Segment | None = None) -> BootImage:
    return BootImage("f", (segment or Segment(0x40000, b"code", 0x2000),), b"text\0", mode, 0x40000)


def test_load_again_restores_and_clears(ram: GuestRam) -> None:
    for _ in range(2):
        image().load(ram)
        assert ram.read(0x40000, 8) == b"code\0\0\0\0"
        assert ram.read(0x20000, 5) == b"text\0"
        assert ram.read(0x41FFF, 1) == b"\0"
        assert ram.read(0x500, 24) == struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
        ram.write(0x40000, b"\xff" * 0x2000)


def test_long_mode_has_page_tables(ram: GuestRam) -> None:
    image("long").load(ram)
    assert struct.unpack("<Q", ram.read(0x9000, 8)) == (0xA003,)
    assert struct.unpack("<4Q", ram.read(0xA000, 32)) == (0xB003, 0xC003, 0xD003, 0xE003)
    assert struct.unpack("<2Q", ram.read(0xB000, 16)) == (0x83, 0x200083)
    assert struct.unpack("<Q", ram.read(0xEFF8, 8)) == (0xFFE00083,)
    assert ram.read(0x508, 8) == struct.pack("<Q", 0x00AF9B000000FFFF)


@pytest.mark.parametrize(
    "segment", [Segment(MIB - 4, b"code", 5), Segment(1 << 40, b"x", 1), Segment(0xFFFFFFFFFFFFFFFF, b"x", 2)]
)
def test_an_image_that_does_not_fit_writes_nothing(ram: GuestRam, segment: Segment) -> None:
    with pytest.raises(BootError, match="Does not fit into guest RAM"):
        image(segment=segment).load(ram)
    assert ram.blocks[0].is_zero(0, MIB)


def test_an_image_over_the_hole() -> None:
    ram = GuestRam([RAMBlock("microvm.ram", 3073 * MIB)], MICROVM_HOLE)
    try:
        with pytest.raises(BootError):
            image(segment=Segment((3 << 30) - 4, b"code", 8)).load(ram)
        image(segment=Segment(4 << 30, b"high", 4)).load(ram)
        assert ram.read(4 << 30, 4) == b"high"
    finally:
        ram.close()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("real", {"env.eip": 0x40000, "env.hflags": 0x40, "rsp": 0x7C00, "rdx": 0x80}),
        ("protected", {"env.cr[0]": 0x33, "env.hflags": 0x4002B0, "rsp": 0x7000, "rbx": 0x20000}),
        ("long", {"env.cr[0]": 0x80010033, "env.cr[3]": 0x9000, "env.efer": 0x500, "rsi": 0x20000}),
    ],
)
def test_first_state(mode: str, expected: dict[str, int]) -> None:
    state = image(mode).first_state(blank(CPU_DESCRIPTION))
    names = {"rdx": 2, "rbx": 3, "rsp": 4, "rsi": 6}
    for name, value in expected.items():
        got = state["env.regs"][names[name]] if name in names else state[name]
        assert got == value, name
    selectors = [segment["selector"] for segment in state["env.segs"]]
    assert selectors == ([0] * 6 if mode == "real" else [0x10, 8, 0x10, 0x10, 0x10, 0x10])
    assert state["env.eflags"] == 2


def test_files(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa" + bytes(512))
    sector = read_boot_sector(str(disk), "p")
    assert (sector.mode, sector.segments[0].guest_address, sector.parameters) == ("real", 0x7C00, b"p\0")
    for bad in (b"", b"\0" * 512):
        disk.write_bytes(bad)
        with pytest.raises(BootError, match="Not bootable"):
            read_boot_sector(str(disk), "")
    with pytest.raises(BootError, match="Could not open '/nonexistent': No such file"):
        read_kernel("/nonexistent", "")
    with pytest.raises(BootError, match="Is a directory"):
        read_kernel(str(tmp_path), "")
    with pytest.raises(BootError, match="Not an ELF file"):
        read_kernel(str(disk), "")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(BootError, match="Not an ELF file"):
        read_kernel(str(fifo), "")
