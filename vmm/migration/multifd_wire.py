"""~ The packets of multifd <-> bytes: pages over several connections, as QEMU 7.2 has it.

    each connection   magic be32 | version be32 | uuid[16] | id u8 | 39 zero bytes                    64 bytes
    then packets      magic be32 | version be32 | flags be32 | pages allocated be32 | pages be32 |
                      bytes that follow be32 | number be64 | 32 zero bytes | RAMBlock[256] |
                      offset be64 [128]                                                             1344 bytes
                      the pages, as they are or in one compressed stream that goes on in the next packet

Rules
1. Pages of zeroes are no part of packets: they are ZERO records in the main stream.
2. Before each EOS of the main stream a packet with the flag SYNC goes over every connection; the destination
   takes no page from it after that until all of them and the main stream have come to this place.

Source: QEMU 7.2 migration/multifd.h, multifd.c (multifd_send_fill_packet, multifd_recv_unfill_packet).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vmm.migration.errors import IllegalRecord, StreamMismatch
from vmm.migration.wire import PAGE_SIZE_BYTES

__all__ = [
    "HEAD_BYTES",
    "HELLO",
    "MAX_PAGES",
    "METHODS",
    "PACKET",
    "SYNC",
    "PacketHead",
    "hello",
    "read_hello",
]

MAGIC: Final = 0x11223344
VERSION: Final = 1
MAX_PAGES: Final = 128
"""MULTIFD_PACKET_SIZE / page size: 512 KiB."""

SYNC: Final = 1
METHODS: Final = {"none": 0, "zlib": 1 << 1, "zstd": 2 << 1}
_METHOD_MASK: Final = 7 << 1

HELLO: Final = struct.Struct(">II16sB39x")
PACKET: Final = struct.Struct(">IIIIIIQ32x256s")
OFFSETS_BYTES: Final = 8 * MAX_PAGES
HEAD_BYTES: Final = PACKET.size + OFFSETS_BYTES
MOST_BYTES: Final = 2 * MAX_PAGES * PAGE_SIZE_BYTES
"""No compressor makes so much of a packet's pages."""


def hello(uuid: bytes | None, number: int) -> bytes:
    """The first bytes of connection `number`."""
    return HELLO.pack(MAGIC, VERSION, uuid or bytes(16), number)


def read_hello(data: bytes, uuid: bytes | None, count: int) -> int:
    """The number of a connection; raises IllegalRecord or StreamMismatch if it is none of `count`."""
    magic, version, theirs, number = HELLO.unpack(data)
    if (magic, version) != (MAGIC, VERSION):
        got = f"{magic:#x}, {version}"
        raise IllegalRecord("multifd magic and version", offset=0, expected=f"{MAGIC:#x}, {VERSION}", got=got)
    ours = uuid or bytes(16)
    if theirs != ours:
        raise StreamMismatch("multifd UUID of the source", offset=8, expected=ours.hex(), got=theirs.hex())
    if number >= count:
        raise IllegalRecord("multifd channel", offset=24, expected=f"below {count}", got=number)
    return int(number)


@dataclass(frozen=True)
class PacketHead:
    """What a packet says of itself; its offsets are for the page pump."""

    flags: int
    pages: int
    size: int
    """Bytes that follow."""
    number: int
    block: str

    def encode(self, offsets: bytes) -> bytes:
        """`offsets`: be64 each."""
        head = (MAGIC, VERSION, self.flags, MAX_PAGES, self.pages, self.size, self.number)
        return PACKET.pack(*head, self.block.encode()) + offsets.ljust(OFFSETS_BYTES, b"\0")

    @classmethod
    def decode(cls, data: bytes, method: int, at: int) -> PacketHead:
        """From the first bytes of a packet at offset `at`; raises IllegalRecord for what cannot be."""
        magic, version, flags, allocated, pages, size, number, name = PACKET.unpack(data)

        def refuse(what: str, offset: int, expected: object, got: object) -> IllegalRecord:
            return IllegalRecord(f"multifd {what}", offset=at + offset, expected=expected, got=got)

        if (magic, version) != (MAGIC, VERSION):
            raise refuse("magic and version", 0, f"{MAGIC:#x}, {VERSION}", f"{magic:#x}, {version}")
        if flags & ~(SYNC | _METHOD_MASK):
            raise refuse("flags", 8, "SYNC and a compression", hex(flags))
        if pages and flags & _METHOD_MASK != method:
            raise refuse("compression", 8, method >> 1, (flags & _METHOD_MASK) >> 1)
        if allocated > MAX_PAGES or pages > allocated:
            raise refuse("page count", 12, f"up to {MAX_PAGES}", f"{pages} of {allocated}")
        exact = pages * PAGE_SIZE_BYTES
        if pages and method == METHODS["none"] and size != exact:
            raise refuse("size of pages", 20, exact, size)
        if not pages:
            size = 0  # stock leaves there what it was the time before
        if size > MOST_BYTES:
            raise refuse("size of pages", 20, f"up to {MOST_BYTES}", size)
        block = name.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        return cls(flags, pages, size, number, block)
