"""The body of a `ram` section as records: the plain twin of what the page pump does in C.

    be64 (offset | flags) [block name str8, unless CONTINUE] [data] [checksum be64, with CHECKSUM]

    MEM_SIZE  offset = total bytes of all blocks; then, until the total is used up: name str8, length be64
    ZERO      1 byte, the fill value (QEMU writes 0 only, and accepts any)
    PAGE      4096 bytes
    XBZRLE    1, length be16, the difference to what the destination has (xbzrle.py); precopy only
    EOS       ends the body of this section

Rules
1. Exactly one of the five flags, alone or (ZERO, PAGE, XBZRLE) with CONTINUE, and CHECKSUM between two
   Pageferries; every other flag belongs to a capability that we do not have, and is refused by its name.
2. CONTINUE means the block of the page record before on this channel. A new channel begins without one.
3. The offset is page aligned, and the page lies inside the block as agreed on.

Source: QEMU 7.2 migration/ram.c (save_page_header, ram_block_from_stream, ram_load_precopy and _postcopy).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vmm.migration import wire
from vmm.migration.checksum import checksum
from vmm.migration.errors import IllegalRecord, PageDamaged, StreamMismatch
from vmm.migration.field_reader import FieldReader, Limits, pack_str8
from vmm.migration.wire import RamFlag

if TYPE_CHECKING:
    from vmm.vmstate import ByteSource

__all__ = [
    "EndOfBody",
    "MemSize",
    "Page",
    "RamReader",
    "RamRecord",
    "RamWriter",
    "XbzrlePage",
    "ZeroPage",
    "check_mem_size",
    "with_checksum",
]

_UNSUPPORTED = {
    RamFlag.FULL: "no obsolete FULL record",
    RamFlag.HOOK: "no RDMA",
    RamFlag.COMPRESS_PAGE: "no capability compress",
    RamFlag.MULTIFD_FLUSH: "no capability multifd",
}


XBZRLE_ENCODING = 1
"""ENCODING_FLAG_XBZRLE, the only one there ever was."""


@dataclass(frozen=True)
class MemSize:
    """The source's RAMBlocks: name -> length in bytes, in its order."""

    blocks: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        return sum(length for _, length in self.blocks)


@dataclass(frozen=True)
class Page:
    """One page; `offset` in bytes in the block."""

    block: str
    offset: int
    data: bytes
    checksum: int | None = None
    """None: the record has none."""


@dataclass(frozen=True)
class ZeroPage:
    """One page that holds `fill` in every byte; `offset` in bytes in the block."""

    block: str
    offset: int
    fill: int = 0
    checksum: int | None = None


@dataclass(frozen=True)
class XbzrlePage:
    """The difference of one page to what was sent before; `offset` in bytes in the block."""

    block: str
    offset: int
    encoded: bytes
    checksum: int | None = None
    """Of the page that it makes: who reads the record alone cannot verify it."""


@dataclass(frozen=True)
class EndOfBody:
    """The body of this section ends here."""


RamRecord = MemSize | Page | ZeroPage | XbzrlePage | EndOfBody


def with_checksum(record: Page | ZeroPage) -> Page | ZeroPage:
    """The record as a source sends it that has agreed on checksums."""
    return replace(record, checksum=_sum(record))


def _sum(record: Page | ZeroPage) -> int:
    if isinstance(record, Page):
        return checksum(record.block, record.offset | RamFlag.PAGE, record.data)
    return checksum(record.block, record.offset | RamFlag.ZERO, wire.U8.pack(record.fill))


def check_mem_size(record: MemSize, blocks: Mapping[str, int], offset: int | None = None) -> None:
    """Raise StreamMismatch unless every RAMBlock of the source is here (name -> bytes) and as long.

    A block of ours that the source does not list is not missed: it keeps what it has, as in QEMU.
    """
    for name, length in record.blocks:
        if name not in blocks:
            text = f"Unknown ramblock '{name}', cannot accept migration"
            raise StreamMismatch(text, offset=offset, expected=f"one of {', '.join(blocks)}", got=name)
        if length != blocks[name]:
            text = f"Length mismatch of RAMBlock '{name}' (is -m the same on both sides?)"
            raise StreamMismatch(text, offset=offset, expected=hex(blocks[name]), got=hex(length))


class RamWriter:
    """Writes page records of one channel; remembers the block, so that its name is written once."""

    def __init__(self) -> None:
        self._last_block: str | None = None

    def reset(self) -> None:
        """Forget the block: a new channel begins (recovery)."""
        self._last_block = None

    def write(self, record: RamRecord) -> bytes:
        """The bytes of a record; raises IllegalRecord if it does not fit the layout."""
        match record:
            case MemSize():
                return self._mem_size(record)
            case Page(block, offset, data, stated):
                if len(data) != wire.PAGE_SIZE_BYTES:
                    raise IllegalRecord("PAGE data", expected=wire.PAGE_SIZE_BYTES, got=len(data))
                return self._page(block, offset, RamFlag.PAGE, data, stated)
            case ZeroPage(block, offset, fill, stated):
                return self._page(block, offset, RamFlag.ZERO, wire.U8.pack(fill), stated)
            case XbzrlePage(block, offset, encoded, stated):
                if len(encoded) > wire.PAGE_SIZE_BYTES:
                    expected = f"up to {wire.PAGE_SIZE_BYTES} bytes"
                    raise IllegalRecord("XBZRLE data", expected=expected, got=len(encoded))
                head = wire.U8.pack(XBZRLE_ENCODING) + wire.U16.pack(len(encoded))
                return self._page(block, offset, RamFlag.XBZRLE, head + encoded, stated)
            case EndOfBody():
                return wire.PAGE_RECORD.pack(RamFlag.EOS)

    def _mem_size(self, record: MemSize) -> bytes:
        head = wire.PAGE_RECORD.pack(record.total_bytes | RamFlag.MEM_SIZE)
        for name, length in record.blocks:
            if length <= 0 or length % wire.PAGE_SIZE_BYTES:
                raise IllegalRecord(f"Length of RAMBlock '{name}'", expected="whole pages", got=length)
        return head + b"".join(
            pack_str8(name, "RAMBlock name") + wire.U64.pack(length) for name, length in record.blocks
        )

    def _page(self, block: str, offset: int, kind: RamFlag, data: bytes, stated: int | None) -> bytes:
        if stated is None:
            return self._page_header(block, offset, kind) + data
        head = self._page_header(block, offset, kind | RamFlag.CHECKSUM)
        return head + data + wire.PAGE_CHECKSUM.pack(stated)

    def _page_header(self, block: str, offset: int, flag: RamFlag) -> bytes:
        if offset < 0 or offset % wire.PAGE_SIZE_BYTES:
            raise IllegalRecord(f"Offset in RAMBlock '{block}'", expected="page aligned", got=hex(offset))
        if block == self._last_block:
            return wire.PAGE_RECORD.pack(offset | flag | RamFlag.CONTINUE)
        name = pack_str8(block, "RAMBlock name")
        self._last_block = block
        return wire.PAGE_RECORD.pack(offset | flag) + name


class RamReader:
    """Reads page records of one channel, for RAMBlocks of the given lengths in bytes."""

    def __init__(self, source: ByteSource, blocks: Mapping[str, int], limits: Limits | None = None) -> None:
        self._source = source
        self._blocks = blocks
        self._limits = limits or Limits()
        self._last_block: str | None = None

    def reset(self) -> None:
        """Forget the block: a new channel begins (recovery)."""
        self._last_block = None

    def read(self) -> RamRecord:
        """The next record of this section's body; raises StreamError if there is none that is legal."""
        fields = FieldReader(self._source, "page record")
        number = fields.u64("header")
        flags = RamFlag(number & wire.RAM_FLAG_MASK)
        offset = number & ~wire.RAM_FLAG_MASK
        match flags & ~(RamFlag.CONTINUE | RamFlag.CHECKSUM):
            case RamFlag.PAGE:
                block, data = self._block(fields, flags, offset), fields.take(wire.PAGE_SIZE_BYTES, "data")
                return _verified(fields, Page(block, offset, data, _stated(fields, flags)))
            case RamFlag.ZERO:
                block, fill = self._block(fields, flags, offset), fields.u8("fill value")
                return _verified(fields, ZeroPage(block, offset, fill, _stated(fields, flags)))
            case RamFlag.XBZRLE:
                block, encoded = self._block(fields, flags, offset), _encoding(fields)
                return XbzrlePage(block, offset, encoded, _stated(fields, flags))
            case RamFlag.MEM_SIZE if flags == RamFlag.MEM_SIZE:
                return self._mem_size(fields, offset)
            case RamFlag.EOS if number == RamFlag.EOS:
                return EndOfBody()
        raise self._unknown_flags(fields, flags, number)

    def _block(self, fields: FieldReader, flags: RamFlag, offset: int) -> str:
        at = fields.offset - wire.PAGE_RECORD.size
        if flags & RamFlag.CONTINUE:
            if self._last_block is None:
                raise IllegalRecord("page record", offset=at, expected="a RAMBlock name", got="CONTINUE")
        else:
            name = fields.str8("RAMBlock name")
            if name not in self._blocks:
                expected = "one of " + ", ".join(self._blocks)
                raise StreamMismatch("Unknown RAMBlock", offset=at, expected=expected, got=name)
            self._last_block = name
        block = self._last_block
        assert block is not None
        if offset >= self._blocks[block]:
            expected = f"below {self._blocks[block]:#x} in RAMBlock '{block}'"
            raise IllegalRecord("Illegal RAM offset", offset=at, expected=expected, got=hex(offset))
        return block

    def _mem_size(self, fields: FieldReader, total: int) -> MemSize:
        fields.record = "MEM_SIZE"
        blocks: dict[str, int] = {}
        left = total
        while left:
            fields.check_limit(len(blocks) + 1, self._limits.ram_blocks, "RAMBlocks")
            name = fields.str8("RAMBlock name")
            length = fields.u64(f"length of RAMBlock '{name}'")
            if length == 0 or length % wire.PAGE_SIZE_BYTES or length > left:
                expected = f"whole pages, {left:#x} at most"
                raise fields.illegal(f"length of RAMBlock '{name}'", expected, hex(length), before=8)
            if name in blocks:
                raise fields.illegal("RAMBlock name", "each block once", name, before=8)
            blocks[name] = length
            left -= length
        return MemSize(tuple(blocks.items()))

    def _unknown_flags(self, fields: FieldReader, flags: RamFlag, number: int) -> IllegalRecord:
        for flag, reason in _UNSUPPORTED.items():
            if flags & flag:
                return fields.illegal("flags", reason, f"{number:#x}", before=8)
        return fields.illegal("flags", "ZERO, PAGE, XBZRLE, MEM_SIZE or EOS", f"{number:#x}", before=8)


def _stated(fields: FieldReader, flags: RamFlag) -> int | None:
    return fields.u64("checksum") if flags & RamFlag.CHECKSUM else None


def _verified(fields: FieldReader, record: Page | ZeroPage) -> Page | ZeroPage:
    if record.checksum is not None and record.checksum != (got := _sum(record)):
        raise PageDamaged(record.block, record.offset, record.checksum, got, offset=fields.offset)
    return record


def _encoding(fields: FieldReader) -> bytes:
    kind, length = fields.u8("encoding"), fields.u16("length of the encoding")
    if kind != XBZRLE_ENCODING:
        raise fields.illegal("encoding", str(XBZRLE_ENCODING), str(kind), before=3)
    fields.check_limit(length, wire.PAGE_SIZE_BYTES, "bytes of XBZRLE")
    return fields.take(length, "encoding")
