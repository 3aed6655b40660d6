"""ACPI Machine Language, as much as a table of devices needs: each function gives the bytes of one term.

Source: ACPI 6.4, chapters 20 "ACPI Machine Language (AML) Specification" and 6.4 "Resource Data Types".
"""

from __future__ import annotations

import struct

__all__ = [
    "device",
    "eisa_id",
    "integer",
    "interrupt",
    "io_ports",
    "irq_no_flags",
    "memory32_fixed",
    "name",
    "package",
    "resources",
    "scope",
    "string",
]

ZERO_OP, ONE_OP, NAME_OP, SCOPE_OP, BUFFER_OP, PACKAGE_OP = (
    b"\x00",
    b"\x01",
    b"\x08",
    b"\x10",
    b"\x11",
    b"\x12",
)
BYTE, WORD, DWORD, STRING = b"\x0a", b"\x0b", b"\x0c", b"\x0d"
DEVICE_OP = b"\x5b\x82"
END_TAG = b"\x79\x00"
LEVEL_ACTIVE_HIGH_CONSUMER = 0x01


def _package_length(length: int) -> bytes:
    """PkgLength counts itself: one byte up to 63, else a nibble and one to three bytes."""
    if length + 1 < 1 << 6:
        return bytes([length + 1])
    for more in (1, 2, 3):
        total = length + 1 + more
        if total < 1 << 4 + 8 * more:
            return bytes([more << 6 | total & 0xF]) + (total >> 4).to_bytes(more, "little")
    raise AssertionError(f"an AML package of {length} bytes")


def _segment(text: str) -> bytes:
    r"""NameSeg, with the root's backslash in front if there is one."""
    root = text[:1] == "\\"
    return (b"\\" if root else b"") + (text[root:].ljust(4, "_").encode("ascii") if text[root:] else b"\0")


def integer(value: int) -> bytes:
    """The shortest form, up to 32 bits."""
    if value < 2:
        return (ZERO_OP, ONE_OP)[value]
    for prefix, layout, limit in ((BYTE, "<B", 1 << 8), (WORD, "<H", 1 << 16), (DWORD, "<I", 1 << 32)):
        if value < limit:
            return prefix + struct.pack(layout, value)
    raise AssertionError(f"an AML integer of {value:#x}")


def string(text: str) -> bytes:
    """ASCII, NUL-terminated."""
    return STRING + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """'PNP0501' as the number that it is in AML."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return DWORD + struct.pack(">I", packed)


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return NAME_OP + _segment(path) + value


def package(*elements: bytes) -> bytes:
    """Package () {elements}."""
    body = bytes([len(elements)]) + b"".join(elements)
    return PACKAGE_OP + _package_length(len(body)) + body


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}."""
    body = _segment(path) + b"".join(terms)
    return SCOPE_OP + _package_length(len(body)) + body


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}."""
    body = _segment(path) + b"".join(terms)
    return DEVICE_OP + _package_length(len(body)) + body


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}: a buffer."""
    data = b"".join(descriptors) + END_TAG
    body = integer(len(data)) + data
    return BUFFER_OP + _package_length(len(body)) + body


def io_ports(first: int, count: int) -> bytes:
    """IO (Decode16, first, first, 1, count)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def irq_no_flags(line: int) -> bytes:
    """IRQNoFlags () {line}: edge triggered, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << line)


def memory32_fixed(first: int, length: int) -> bytes:
    """Memory32Fixed (ReadWrite, first, length)."""
    return struct.pack("<BHBII", 0x86, 9, 1, first, length)


def interrupt(line: int) -> bytes:
    """Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) {line}."""
    return struct.pack("<BHBBI", 0x89, 6, LEVEL_ACTIVE_HIGH_CONSUMER, 1, line)
