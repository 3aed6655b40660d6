"""The ELF reader: good files, and every way in which a file can be bad."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.boot.elf import Segment, parse_elf
from vmm.errors import BootError


def elf32(
    *, machine: int = 3, kind: int = 2, load: tuple[int, int, int, int] = (84, 0x100000, 4, 8), count: int = 1
) -> bytes:
    """An ELF32 file with one segment of (offset, paddr, filesz, memsz)."""
    offset, paddr, filesz, memsz = load
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, 0x100000, 52, 0, 0, 52, 32, count, 0, 0, 0)
    program = struct.pack("<IIIIIIII", 1, offset, 0, paddr, filesz, memsz, 7, 0)
    return ident + header + program + b"CODE"


def elf64(*, machine: int = 62) -> bytes:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 1 << 33, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    note = struct.pack("<IIQQQQQQ", 4, 7, 0, 0, 0, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 7, 64 + 112, 0, 1 << 33, 4, 4096, 0)
    return ident + header + note + program + b"CODE"


def test_elf32() -> None:
    image = parse_elf(elf32(), "f")
    assert (image.is_64bit, image.entry) == (False, 0x100000)
    assert image.segments == (Segment(0x100000, b"CODE", 8),)


def test_elf64() -> None:
    image = parse_elf(elf64(), "f")
    assert (image.is_64bit, image.entry) == (True, 1 << 33)
    assert image.segments == (Segment(1 << 33, b"CODE", 4096),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Not an ELF file"),
        (b"MZ" + bytes(60), "Not an ELF file"),
        (b"\x7fELF\x03\x01" + bytes(60), "got class 3"),
        (b"\x7fELF\x01\x02" + bytes(60), "got class 1, data 2"),
        (b"\x7fELF\x02\x01" + bytes(46), "The ELF header is cut off"),
        (elf32(machine=40), "got machine 40"),
        (elf64(machine=3), "got machine 3"),
        (elf32(kind=1), "Expected an executable, got ELF type 1"),
        (elf32(count=200), "200 program headers"),
        (elf32(count=9), "Program header 1 is cut off"),
        (elf32(load=(84, 0, 5, 8)), "Segment 0 ends at 0x59, the file at 0x58"),
        (elf32(load=(84, 0, 4, 3)), "Segment 0 has 0x4 bytes in the file, 0x3 in memory"),
        (elf32(load=(84, 0, 0, 0)), "Nothing to load"),
        (elf32(count=0), "Nothing to load"),
    ],
)
def test_bad_files(data: bytes, message: str) -> None:
    with pytest.raises(BootError) as caught:
        parse_elf(data, "guest.elf")
    assert str(caught.value).startswith("guest.elf: ")
    assert message in str(caught.value)


@given(st.sampled_from([elf32(), elf64()]), st.integers(0, 200), st.binary(max_size=8))
def test_damage_gives_an_image_or_a_boot_error(data: bytes, at: int, damage: bytes) -> None:
    with contextlib.suppress(BootError):
        parse_elf(data[:at] + damage + data[at + len(damage) :], "f")
