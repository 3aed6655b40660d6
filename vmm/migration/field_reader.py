"""Checked reads of a record's fields: each one names what it reads, so that each failure can say it.

A parser over this reads like the diagram of the format (`wire.py`). Every length that comes from the peer
passes through a limit before anything is read or allocated.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.errors import StreamTruncated
from vmm.migration import wire
from vmm.migration.errors import IllegalRecord, LimitExceeded, RecordTruncated

if TYPE_CHECKING:
    from vmm.vmstate import ByteSource

__all__ = ["FieldReader", "Limits", "pack_str8"]


@dataclass(frozen=True)
class Limits:
    """What a reader takes from a peer at most; these are security limits.

    The package limit is QEMU's (savevm.h: MAX_VM_CMD_PACKAGED_SIZE), the others are arbitrary: far above
    what any machine of ours or stock QEMU sends, far below what hurts.
    """

    machine_name_bytes: int = 256
    capabilities: int = 64
    ram_blocks: int = 1024
    package_bytes: int = wire.MAX_PACKAGE_BYTES
    vmdescription_bytes: int = 1 << 24
    bitmap_bytes: int = 1 << 28


class FieldReader:
    """Reads the fields of one record from `source`; `record` is the name that errors give to it."""

    def __init__(self, source: ByteSource, record: str) -> None:
        self._source = source
        self.record = record

    @property
    def offset(self) -> int:
        """Where the next byte stands in the stream."""
        return self._source.offset

    def what(self, field: str) -> str:
        """The name of a field of this record, for an error."""
        return f"{self.record} {field}"

    def illegal(self, field: str, expected: object, got: object, *, before: int = 0) -> IllegalRecord:
        """The error for a field whose value is wrong, `before` bytes back from here."""
        return IllegalRecord(self.what(field), offset=self.offset - before, expected=expected, got=got)

    def take(self, count: int, field: str) -> bytes:
        """Exactly `count` bytes; raises RecordTruncated if there are fewer."""
        try:
            return self._source.read(count)
        except StreamTruncated as error:
            raise RecordTruncated(self.what(field), error.wanted, error.got, offset=error.offset) from error

    def take_counted(self, count: int, limit: int, field: str) -> bytes:
        """`count` bytes, where `count` came from the peer; raises LimitExceeded above `limit`."""
        self.check_limit(count, limit, field)
        return self.take(count, field)

    def check_limit(self, count: int, limit: int, field: str) -> None:
        """Raise LimitExceeded if `count`, which came from the peer, is above `limit`."""
        if count > limit:
            raise LimitExceeded(self.what(field), offset=self.offset, expected=f"{limit} at most", got=count)

    def number(self, layout: struct.Struct, field: str) -> int:
        """One integer of the given layout."""
        value: int = layout.unpack(self.take(layout.size, field))[0]
        return value

    def u8(self, field: str) -> int:
        return self.number(wire.U8, field)

    def u16(self, field: str) -> int:
        return self.number(wire.U16, field)

    def u32(self, field: str) -> int:
        return self.number(wire.U32, field)

    def u64(self, field: str) -> int:
        return self.number(wire.U64, field)

    def str8(self, field: str) -> str:
        """A str8; raises IllegalRecord unless it is UTF-8 without NUL and not empty."""
        raw = self.take(self.u8(f"{field} length"), field)
        return self.text(raw, field)

    def text(self, raw: bytes, field: str) -> str:
        """Bytes just read as a name; raises IllegalRecord unless it is UTF-8 without NUL and not empty."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.illegal(field, "a name", repr(raw[:40]), before=len(raw)) from None
        if not text or "\0" in text:
            raise self.illegal(field, "a name", repr(raw[:40]), before=len(raw))
        return text

    def fixed(self, layout: struct.Struct, value: int, field: str) -> None:
        """A field that always has the same value; raises IllegalRecord if it has another."""
        got = self.number(layout, field)
        if got != value:
            raise self.illegal(field, hex(value), hex(got), before=layout.size)


def pack_str8(text: str, what: str) -> bytes:
    """A name as str8; raises IllegalRecord if it cannot be one (empty, NUL, over 255 bytes)."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raise IllegalRecord(what, expected="a name", got=repr(text[:40])) from None
    if not raw or b"\0" in raw or len(raw) > wire.MAX_BLOCK_NAME_BYTES:
        expected = f"a name of 1 to {wire.MAX_BLOCK_NAME_BYTES} bytes without NUL"
        raise IllegalRecord(what, expected=expected, got=repr(text[:40]))
    return wire.U8.pack(len(raw)) + raw
