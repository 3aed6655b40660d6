"""Reads an ELF file of a guest: where its pieces go and where it is entered. Pure; every number is checked.

    e_ident  7f 'E' 'L' 'F'  class(1: 32 bit, 2: 64 bit)  data(1: little-endian)
    header   e_type ET_EXEC, or ET_DYN at its linked addresses; e_machine 3 (i386) or 62 (x86-64); e_entry;
             e_phoff
    PT_NOTE  Xen's note 18: an entry point for the PVH boot protocol, in 32-bit mode
    PT_LOAD  p_filesz bytes at p_offset go to guest physical p_paddr; zeroes up to p_memsz

Source: System V ABI, chapter 4 (Object Files) and the i386 and AMD64 supplements.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmm.errors import BootError

__all__ = ["ElfImage", "Segment", "parse_elf"]

MAGIC = b"\x7fELF"
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
NOTE_OWNER, NOTE_PHYS32_ENTRY = b"Xen\0", 18
SEGMENT_LIMIT = 128
"""Arbitrary; a linker makes fewer than ten."""

_HEADER = {1: "<HHIIIIIHHHHHH", 2: "<HHIQQQIHHHHHH"}
_PROGRAM = {1: "<IIIIIIII", 2: "<IIQQQQQQ"}


@dataclass(frozen=True)
class Segment:
    """`data` at `guest_address`, zeroes after it up to `length` bytes."""

    guest_address: int
    data: bytes
    length: int


@dataclass(frozen=True)
class ElfImage:
    """What to load and where to start; `is_64bit` says in which mode."""

    is_64bit: bool
    entry: int
    segments: tuple[Segment, ...]
    pvh_entry: int | None = None


def parse_elf(data: bytes, name: str) -> ElfImage:
    """Raises BootError, which says what is wrong with the file `name`."""

    def fail(text: str) -> BootError:
        return BootError(f"{name}: {text}")

    if data[:4] != MAGIC or len(data) < 52:
        raise fail("Not an ELF file: expected an ELF32 or ELF64 executable for x86")
    elf_class, encoding = data[4], data[5]
    if elf_class not in _HEADER or encoding != 1:
        raise fail(f"Expected a little-endian 32 or 64 bit ELF file, got class {elf_class}, data {encoding}")
    header = _unpack(_HEADER[elf_class], data, 16, fail("The ELF header is cut off"))
    kind, machine, _, entry, program_offset = header[:5]
    entry_bytes, count = header[8], header[9]
    if machine not in (EM_386, EM_X86_64) or (machine == EM_X86_64) != (elf_class == 2):
        raise fail(f"Expected an ELF32 file for i386 or an ELF64 file for x86-64, got machine {machine}")
    if kind not in (ET_EXEC, ET_DYN):
        raise fail(f"Expected an executable, got ELF type {kind}")
    layout = _PROGRAM[elf_class]
    if count > SEGMENT_LIMIT or (count and entry_bytes != struct.calcsize(layout)):
        raise fail(f"{count} program headers of {entry_bytes} bytes cannot be")
    segments = []
    pvh_entry: int | None = None
    for index in range(count):
        cut_off = fail(f"Program header {index} is cut off")
        fields = _unpack(layout, data, program_offset + index * entry_bytes, cut_off)
        if fields[0] not in (PT_LOAD, PT_NOTE):
            continue
        offset, paddr, file_bytes, memory_bytes = (
            (fields[1], fields[3], fields[4], fields[5]) if elf_class == 1 else (*fields[2:3], *fields[4:7])
        )
        if fields[0] == PT_NOTE:
            pvh_entry = _pvh_entry(data[offset : offset + file_bytes], pvh_entry)
            continue
        if offset + file_bytes > len(data):
            raise fail(f"Segment {index} ends at {offset + file_bytes:#x}, the file at {len(data):#x}")
        if file_bytes > memory_bytes:
            raise fail(f"Segment {index} has {file_bytes:#x} bytes in the file, {memory_bytes:#x} in memory")
        if memory_bytes:
            segments.append(Segment(paddr, data[offset : offset + file_bytes], memory_bytes))
    if not segments:
        raise fail("Nothing to load: the file has no PT_LOAD segment")
    return ElfImage(elf_class == 2, entry, tuple(segments), pvh_entry)


def _pvh_entry(notes: bytes, found: int | None) -> int | None:
    """The entry point that the notes name, `found` if they name none. A note that is cut off ends them."""
    while len(notes) >= 12:
        owner_bytes, bytes_, kind = struct.unpack_from("<III", notes)
        value = 12 + (owner_bytes + 3 & -4)
        end = value + (bytes_ + 3 & -4)
        if value + bytes_ > len(notes):
            break
        is_entry = kind == NOTE_PHYS32_ENTRY and notes[12 : 12 + owner_bytes] == NOTE_OWNER
        if is_entry and bytes_ in (4, 8):
            found = int.from_bytes(notes[value : value + bytes_], "little") & 0xFFFFFFFF
        notes = notes[end:]
    return found


def _unpack(layout: str, data: bytes, offset: int, error: BootError) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, offset)
    except struct.error:
        raise error from None
