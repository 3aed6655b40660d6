"""Every number and layout of the migration stream and the return path, with its source.

All integers are big-endian. `str8` is one length byte and that many bytes, no NUL.

    51 45 56 4d | 00 00 00 03 | 07 configuration | records ... | 00 EOF | 06 VMDESCRIPTION

    record          after the id byte
    01 START        section_id be32, idstr str8, instance_id be32, version_id be32, body, footer
    02 PART         section_id be32, body, footer
    03 END          section_id be32, body, footer
    04 FULL         as START
    05 SUBSECTION   name str8, version_id be32, fields, nested subsections    (inside a body)
    06 VMDESCRIPTION  length be32, JSON
    07 CONFIGURATION  length be32, machine name, subsections
    08 COMMAND      command be16, length be16, payload
    7e FOOTER       section_id be32

    page record     be64 (offset | flags) [str8 block name unless CONTINUE] [data]
    return path     type be16, length be16, payload

Sources are files of QEMU 7.2: migration/savevm.h and savevm.c (records, commands), migration/ram.c (page
records), migration/migration.c (return path), docs/devel/migration.rst. Where 10.2 added a number that
a 7.2 peer may meet, it is here with its version.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

__all__ = [
    "COMMAND_LENGTHS",
    "MAGIC",
    "PAGE_SIZE_BYTES",
    "RETURN_PATH_LENGTHS",
    "VERSION",
    "Command",
    "RamFlag",
    "RecordType",
    "ReturnPathType",
]

U8: Final = struct.Struct(">B")
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")

# The header (savevm.h: QEMU_VM_FILE_MAGIC, QEMU_VM_FILE_VERSION).
MAGIC: Final = 0x5145564D
"""The bytes "QEVM"."""
VERSION: Final = 3
VERSION_OBSOLETE: Final = 2
"""Version 2 had no machine checks and is refused by name (savevm.c: QEMU_VM_FILE_VERSION_COMPAT)."""
HEADER: Final = struct.Struct(">II")
"""Magic, version."""


class RecordType(IntEnum):
    """The id byte of a record (savevm.h: QEMU_VM_*)."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    SECTION_FOOTER = 0x7E


class Command(IntEnum):
    """The number of a COMMAND record (savevm.c: enum qemu_vm_cmd)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11
    """10.x only; 7.2 never sends it and fails on it, we read past it."""

    # Between two Pageferries only (hand_over.py, recovery.py); never sent to another peer.
    X_HAND_OVER = 0x5001
    """Names this migration: from here on the destination starts the guest on X_START only."""
    X_START = 0x5002
    """The guest is the destination's: start it."""
    X_KEEP = 0x5003
    """The guest stays at the source: forget it."""
    X_ASK = 0x5004
    """Recovery: what became of the migration of this name?"""
    X_PAGE_CHECKSUMS = 0x5005
    """From here on each page record has a checksum (page_checks.py)."""
    X_RECEIVED = 0x5006
    """After the discards: a digest of the pages that the destination should have now."""


LAST_STOCK_COMMAND: Final = Command.SWITCHOVER_START


COMMAND_LENGTHS: Final[dict[Command, tuple[int, ...] | None]] = {
    Command.OPEN_RETURN_PATH: (0,),
    Command.PING: (4,),
    # Zero length is the advice of a source that has only dirty bitmaps to send later.
    Command.POSTCOPY_ADVISE: (16, 0),
    Command.POSTCOPY_LISTEN: (0,),
    Command.POSTCOPY_RUN: (0,),
    Command.POSTCOPY_RAM_DISCARD: None,
    Command.PACKAGED: (4,),
    Command.ENABLE_COLO: (0,),
    Command.POSTCOPY_RESUME: (0,),
    Command.RECV_BITMAP: None,
    Command.SWITCHOVER_START: (0,),
    Command.X_HAND_OVER: (16,),
    Command.X_START: (0,),
    Command.X_KEEP: (0,),
    Command.X_ASK: (16,),
    Command.X_PAGE_CHECKSUMS: (4,),
    Command.X_RECEIVED: (8,),
}
"""Payload lengths in bytes that a command may have; None: it varies (savevm.c: mig_cmd_args)."""

COMMAND_HEADER: Final = struct.Struct(">HH")
"""Command, payload length in bytes."""

# The values of PING that a 7.2 source sends (savevm.c, migration.c).
PING_RETURN_PATH_OPEN: Final = 1
PING_BEFORE_PACKAGE: Final = 2
PING_PACKAGE_END: Final = 3
PING_AFTER_PACKAGE: Final = 4
PING_PACKAGE_LOADED: Final = 0x42
"""10.2: put before RUN; its PONG moves a 10.2 source from postcopy-device to postcopy-active."""

ADVISE: Final = struct.Struct(">QQ")
"""POSTCOPY_ADVISE: OR of the page sizes of all RAM blocks, target page size, both in bytes."""
DISCARD_VERSION: Final = 0
DISCARD_RANGE: Final = struct.Struct(">QQ")
"""One discarded range: start in the block, length, both in BYTES."""
MAX_DISCARDS_PER_COMMAND: Final = 12
"""postcopy-ram.c: MAX_DISCARDS_PER_COMMAND."""
MAX_PACKAGE_BYTES: Final = 1 << 24
"""A larger package is refused by every receiver (savevm.h: MAX_VM_CMD_PACKAGED_SIZE)."""

# Section headers and what stands in the configuration record.
SECTION_ID: Final = U32
SECTION_NUMBERS: Final = struct.Struct(">II")
"""instance_id, version_id."""
CONFIGURATION_CAPABILITIES: Final = "configuration/capabilities"
CONFIGURATION_UUID: Final = "configuration/uuid"
CONFIGURATION_TARGET_PAGE_BITS: Final = "configuration/target-page-bits"
UUID_BYTES: Final = 16

# The ram section (ram.c).
RAM_IDSTR: Final = "ram"
RAM_INSTANCE_ID: Final = 0
RAM_VERSION: Final = 4

PAGE_SIZE_BYTES: Final = 4096
"""The target page size of x86, the unit of every page record."""
RAM_FLAG_MASK: Final = PAGE_SIZE_BYTES - 1
"""The low bits of a page record's first number; the rest is the offset."""


class RamFlag(IntFlag):
    """Flags of a page record (ram.c: RAM_SAVE_FLAG_*)."""

    FULL = 0x01
    """Obsolete, refused."""
    ZERO = 0x02
    """1 byte follows, the fill value; QEMU writes 0 only."""
    MEM_SIZE = 0x04
    """The offset part is the total of all blocks; the list of blocks follows."""
    PAGE = 0x08
    """4096 bytes follow."""
    EOS = 0x10
    """End of this section's body."""
    CONTINUE = 0x20
    """Same block as the record before on this channel: no name follows."""
    XBZRLE = 0x40
    HOOK = 0x80
    """RDMA only."""
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200
    """8.1 and later."""
    CHECKSUM = 0x800
    """Between two Pageferries only: the data is followed by its be64 checksum (checksum.py)."""


PAGE_CHECKSUM: Final = U64
PAGE_CHECKSUM_ALGORITHM: Final = 1
"""Four lanes of CRC32C, mixed to 64 bits; the payload of X_PAGE_CHECKSUMS."""

PAGE_RECORD: Final = U64
MAX_BLOCK_NAME_BYTES: Final = 255
"""What a str8 can hold; QEMU's RAMBlock.idstr holds as much."""


class ReturnPathType(IntEnum):
    """The type of a return path message (migration.c: enum mig_rp_message_type)."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
    """8.1 and later; a 7.2 source refuses it."""

    # Between two Pageferries only.
    X_LOADED = 0x5001
    """All that a start needs is here; the guest waits for X_START."""
    X_STARTED = 0x5002
    """The guest was started."""
    X_FATE = 0x5003
    """Answers X_ASK."""


LAST_STOCK_MESSAGE: Final = ReturnPathType.SWITCHOVER_ACK


RETURN_PATH_LENGTHS: Final[dict[ReturnPathType, int | None]] = {
    ReturnPathType.SHUT: 4,
    ReturnPathType.PONG: 4,
    ReturnPathType.REQ_PAGES_ID: None,
    ReturnPathType.REQ_PAGES: 12,
    ReturnPathType.RECV_BITMAP: None,
    ReturnPathType.RESUME_ACK: 4,
    ReturnPathType.SWITCHOVER_ACK: 0,
    ReturnPathType.X_LOADED: 0,
    ReturnPathType.X_STARTED: 0,
    ReturnPathType.X_FATE: 4,
}
"""Payload length in bytes of each message; None: it varies (migration.c: rp_cmd_args)."""

RETURN_PATH_HEADER: Final = struct.Struct(">HH")
"""Type, payload length in bytes."""
MAX_RETURN_PATH_PAYLOAD_BYTES: Final = 512
"""The buffer of source_return_path_thread; a longer message is refused."""
REQ_PAGES: Final = struct.Struct(">QI")
"""Start in the block, length, both in bytes; REQ_PAGES_ID adds the block's name as str8."""
SHUT_FINE: Final = 0
SHUT_ERROR: Final = 1
RESUME_ACK_VALUE: Final = 1
RECV_BITMAP_ENDING: Final = 0x0123456789ABCDEF
"""Follows a received bitmap (ram.c: RAMBLOCK_RECV_BITMAP_ENDING)."""
