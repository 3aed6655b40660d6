"""Messages of the return path <-> bytes, and the check of a page request. Destination -> source.

    type be16 | length be16 | payload[length]

    SHUT          value be32: 0 = the destination is done and fine, else it failed
    PONG          value be32 of the PING
    REQ_PAGES_ID  start be64, length be32, block str8      bytes in the block
    REQ_PAGES     start be64, length be32                  in the block of the last REQ_PAGES_ID
    RECV_BITMAP   block str8; then, outside `length`: size be64, bitmap[size], 0x0123456789abcdef be64
    RESUME_ACK    1 be32
    SWITCHOVER_ACK  empty (8.1 and later)
    X_LOADED      empty                                    between two Pageferries (peer.py)
    X_STARTED     empty
    X_FATE        be32

The block of the last REQ_PAGES_ID is remembered per channel, by both ends; a new channel begins without one.
The bitmap is little-endian, bit i = page i is received, its size a multiple of 8 bytes.

Source: QEMU 7.2 migration/migration.c (source_return_path_thread, migrate_send_rp_*), migration/ram.c
(ramblock_recv_bitmap_send).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.migration import wire
from vmm.migration.errors import BadPageRequest, IllegalRecord, StreamMismatch
from vmm.migration.field_reader import FieldReader, Limits, pack_str8
from vmm.migration.peer import Fate
from vmm.migration.wire import ReturnPathType

if TYPE_CHECKING:
    from vmm.vmstate import ByteSource

__all__ = [
    "FateReply",
    "Loaded",
    "Message",
    "MessageReader",
    "MessageWriter",
    "Pong",
    "RecvBitmapReply",
    "ReqPages",
    "ResumeAck",
    "Shut",
    "Started",
    "SwitchoverAck",
    "bitmap_size_bytes",
    "check_request",
]


@dataclass(frozen=True)
class Shut:
    """The destination is done; anything but 0 means that it failed."""

    value: int = wire.SHUT_FINE


@dataclass(frozen=True)
class Pong:
    """Answers PING with its value."""

    value: int


@dataclass(frozen=True)
class ReqPages:
    """The destination wants `length` bytes from `start` of a RAMBlock, both whole pages."""

    block: str
    start: int
    length: int


@dataclass(frozen=True)
class RecvBitmapReply:
    """The received map of a RAMBlock, little-endian, bit i = page i; 8-byte multiple."""

    block: str
    bitmap: bytes


@dataclass(frozen=True)
class ResumeAck:
    """The destination goes on after recovery."""


@dataclass(frozen=True)
class SwitchoverAck:
    """8.1 and later: the destination agrees to switchover."""


@dataclass(frozen=True)
class Loaded:
    """Pageferry: everything that a start needs is here; the guest waits for Start."""


@dataclass(frozen=True)
class Started:
    """Pageferry: the guest was started."""


@dataclass(frozen=True)
class FateReply:
    """Pageferry: what became of the migration that was asked for."""

    fate: Fate


Message = Shut | Pong | ReqPages | RecvBitmapReply | ResumeAck | SwitchoverAck | Loaded | Started | FateReply


def bitmap_size_bytes(page_count: int) -> int:
    """How long the received map of `page_count` pages is on the wire."""
    return (page_count + 63) // 64 * 8


def check_request(request: ReqPages, page_counts: Mapping[str, int]) -> tuple[int, int]:
    """The first page and the number of pages of a request; raises BadPageRequest unless they exist.

    `page_counts` maps the name of each RAMBlock to its length in pages.
    """

    def bad(reason: str) -> BadPageRequest:
        return BadPageRequest(request.block, request.start, request.length, reason)

    if request.block not in page_counts:
        raise bad("there is no such RAMBlock")
    if request.start % wire.PAGE_SIZE_BYTES:
        raise bad("the start is not page aligned")
    if request.length == 0 or request.length % wire.PAGE_SIZE_BYTES:
        raise bad("the length is not whole pages")
    first, count = request.start // wire.PAGE_SIZE_BYTES, request.length // wire.PAGE_SIZE_BYTES
    if first + count > page_counts[request.block]:
        raise bad(f"the block has {page_counts[request.block]} pages")
    return first, count


class MessageWriter:
    """Messages -> bytes for one channel; remembers the block of the last page request."""

    def __init__(self) -> None:
        self._last_block: str | None = None

    def reset(self) -> None:
        """Forget the block: a new channel begins (recovery)."""
        self._last_block = None

    def write(self, message: Message) -> bytes:
        """The bytes of a message; raises IllegalRecord if it does not fit the layout."""
        match message:
            case Shut(value):
                return _pack(ReturnPathType.SHUT, wire.U32.pack(value))
            case Pong(value):
                return _pack(ReturnPathType.PONG, wire.U32.pack(value))
            case ReqPages():
                return self._req_pages(message)
            case RecvBitmapReply(block, bitmap):
                if len(bitmap) % 8:
                    raise IllegalRecord("RECV_BITMAP size", expected="a multiple of 8", got=len(bitmap))
                name = pack_str8(block, "RECV_BITMAP block")
                size, ending = wire.U64.pack(len(bitmap)), wire.U64.pack(wire.RECV_BITMAP_ENDING)
                return _pack(ReturnPathType.RECV_BITMAP, name) + size + bitmap + ending
            case ResumeAck():
                return _pack(ReturnPathType.RESUME_ACK, wire.U32.pack(wire.RESUME_ACK_VALUE))
            case SwitchoverAck():
                return _pack(ReturnPathType.SWITCHOVER_ACK, b"")
            case Loaded():
                return _pack(ReturnPathType.X_LOADED, b"")
            case Started():
                return _pack(ReturnPathType.X_STARTED, b"")
            case FateReply(fate):
                return _pack(ReturnPathType.X_FATE, wire.U32.pack(fate.value))

    def _req_pages(self, request: ReqPages) -> bytes:
        where = wire.REQ_PAGES.pack(request.start, request.length)
        if request.block == self._last_block:
            return _pack(ReturnPathType.REQ_PAGES, where)
        raw = _pack(ReturnPathType.REQ_PAGES_ID, where + pack_str8(request.block, "REQ_PAGES_ID block"))
        self._last_block = request.block
        return raw


def _pack(message_type: ReturnPathType, payload: bytes) -> bytes:
    return wire.RETURN_PATH_HEADER.pack(message_type, len(payload)) + payload


class MessageReader:
    """Bytes -> messages for one channel; `page_counts` maps each RAMBlock to its length in pages."""

    def __init__(self, page_counts: Mapping[str, int], limits: Limits | None = None) -> None:
        self._page_counts = page_counts
        self._limits = limits or Limits()
        self._last_block: str | None = None

    def reset(self) -> None:
        """Forget the block: a new channel begins (recovery)."""
        self._last_block = None

    def read(self, source: ByteSource) -> Message:
        """The next message; raises StreamError. A page request still wants `check_request`."""
        fields = FieldReader(source, "return path message")
        number, length = fields.u16("type"), fields.u16("length")
        return self.read_payload(source, number, length)

    def read_payload(self, source: ByteSource, number: int, length: int) -> Message:
        """What follows a header with type `number` and payload length `length`; raises StreamError."""
        fields = FieldReader(source, "return path message")
        try:
            message_type = ReturnPathType(number)
        except ValueError:
            expected = f"1 to {wire.LAST_STOCK_MESSAGE}"
            raise fields.illegal("type", expected, number, before=4) from None
        fields.record = message_type.name
        fields.check_limit(length, wire.MAX_RETURN_PATH_PAYLOAD_BYTES, "payload")
        wanted = wire.RETURN_PATH_LENGTHS[message_type]
        if wanted is not None and length != wanted:
            raise fields.illegal("length", wanted, length, before=2)
        match message_type:
            case ReturnPathType.SHUT:
                return Shut(fields.u32("value"))
            case ReturnPathType.PONG:
                return Pong(fields.u32("value"))
            case ReturnPathType.REQ_PAGES_ID:
                return self._req_pages_id(fields, length)
            case ReturnPathType.REQ_PAGES:
                return self._req_pages(fields)
            case ReturnPathType.RECV_BITMAP:
                return self._recv_bitmap(fields, length)
            case ReturnPathType.RESUME_ACK:
                fields.fixed(wire.U32, wire.RESUME_ACK_VALUE, "value")
                return ResumeAck()
            case ReturnPathType.SWITCHOVER_ACK:
                return SwitchoverAck()
            case ReturnPathType.X_LOADED:
                return Loaded()
            case ReturnPathType.X_STARTED:
                return Started()
            case ReturnPathType.X_FATE:
                return self._fate(fields)

    def _req_pages_id(self, fields: FieldReader, length: int) -> ReqPages:
        if length < wire.REQ_PAGES.size + 2:
            raise fields.illegal("length", f"at least {wire.REQ_PAGES.size + 2}", length, before=2)
        start, size = fields.u64("start"), fields.u32("length of the pages")
        block = self._name(fields, length - wire.REQ_PAGES.size)
        self._last_block = block
        return ReqPages(block, start, size)

    def _req_pages(self, fields: FieldReader) -> ReqPages:
        start, size = fields.u64("start"), fields.u32("length of the pages")
        if self._last_block is None:
            raise fields.illegal("block", "one REQ_PAGES_ID before", "none", before=wire.REQ_PAGES.size)
        return ReqPages(self._last_block, start, size)

    def _recv_bitmap(self, fields: FieldReader, length: int) -> RecvBitmapReply:
        block = self._name(fields, length)
        if block not in self._page_counts:
            expected = "one of " + ", ".join(self._page_counts)
            raise StreamMismatch("RECV_BITMAP block", offset=fields.offset, expected=expected, got=block)
        size, wanted = fields.u64("size"), bitmap_size_bytes(self._page_counts[block])
        fields.check_limit(size, self._limits.bitmap_bytes, "size")
        if size != wanted:
            raise fields.illegal(f"size for RAMBlock '{block}'", wanted, size, before=8)
        bitmap = fields.take(size, "bitmap")
        padding = int.from_bytes(bitmap[-8:], "little") >> ((self._page_counts[block] - 1) % 64 + 1)
        if padding:
            raise fields.illegal(f"padding for RAMBlock '{block}'", "zeroes", hex(padding), before=8)
        fields.fixed(wire.U64, wire.RECV_BITMAP_ENDING, "ending")
        return RecvBitmapReply(block, bitmap)

    @staticmethod
    def _fate(fields: FieldReader) -> FateReply:
        value = fields.u32("fate")
        try:
            return FateReply(Fate(value))
        except ValueError:
            raise fields.illegal("fate", f"0 to {len(Fate) - 1}", value, before=4) from None

    @staticmethod
    def _name(fields: FieldReader, length: int) -> str:
        """A str8 that is all of the `length` bytes left of the payload."""
        if length < 2:
            raise fields.illegal("length", "a block name", length, before=2)
        name_bytes = fields.u8("block length")
        if name_bytes + 1 != length:
            raise fields.illegal("block length", length - 1, name_bytes, before=1)
        return fields.text(fields.take(name_bytes, "block"), "block")
