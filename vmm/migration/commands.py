"""COMMAND records of the migration stream, one class each: its fields, its bytes, and how to read it.

    08 | command be16 | length be16 | payload[length]

Layout and meaning: `wire.py`; order of commands: the destination's business. Commands whose payload is
empty have no fields. An unknown command is an error, as it is for QEMU.

Source: QEMU 7.2 migration/savevm.c (mig_cmd_args, qemu_savevm_send_*, loadvm_process_command).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmm.migration import wire
from vmm.migration.errors import IllegalRecord
from vmm.migration.field_reader import FieldReader, Limits, pack_str8

__all__ = [
    "COMMANDS",
    "Ask",
    "CommandRecord",
    "EnableColo",
    "HandOver",
    "Keep",
    "OpenReturnPath",
    "Packaged",
    "PageChecksums",
    "Ping",
    "PostcopyAdvise",
    "PostcopyListen",
    "PostcopyRamDiscard",
    "PostcopyResume",
    "PostcopyRun",
    "Received",
    "RecvBitmap",
    "Start",
    "SwitchoverStart",
    "read_command",
]


@dataclass(frozen=True)
class CommandRecord:
    """What all commands share; by itself it is a command with an empty payload."""

    command: ClassVar[wire.Command]

    @property
    def name(self) -> str:
        """The command's name on the wire."""
        return self.command.name

    def payload(self) -> bytes:
        """The bytes that `length` counts."""
        return b""

    def encode(self) -> bytes:
        payload = self.payload()
        if len(payload) > 0xFFFF:
            raise IllegalRecord(f"{self.name} payload", expected="65535 bytes at most", got=len(payload))
        return (
            wire.U8.pack(wire.RecordType.COMMAND)
            + wire.COMMAND_HEADER.pack(self.command, len(payload))
            + payload
        )

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> CommandRecord:
        """Read a payload of `length` bytes, already checked against the lengths this command may have."""
        del fields, length, limits
        return cls()


@dataclass(frozen=True)
class OpenReturnPath(CommandRecord):
    """The destination starts to write on the same connection."""

    command = wire.Command.OPEN_RETURN_PATH


@dataclass(frozen=True)
class Ping(CommandRecord):
    """Answered by PONG with the same value."""

    command = wire.Command.PING
    value: int

    def payload(self) -> bytes:
        return wire.U32.pack(self.value)

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> Ping:
        return cls(fields.u32("value"))


@dataclass(frozen=True)
class PostcopyAdvise(CommandRecord):
    """Postcopy may follow; both sizes are None if only dirty bitmaps would be sent late."""

    command = wire.Command.POSTCOPY_ADVISE
    ram_page_sizes_bytes: int | None = wire.PAGE_SIZE_BYTES
    """The page sizes of all RAM blocks, ORed."""
    target_page_size_bytes: int | None = wire.PAGE_SIZE_BYTES

    def payload(self) -> bytes:
        if self.ram_page_sizes_bytes is None or self.target_page_size_bytes is None:
            return b""
        return wire.ADVISE.pack(self.ram_page_sizes_bytes, self.target_page_size_bytes)

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> PostcopyAdvise:
        if length == 0:
            return cls(None, None)
        return cls(fields.u64("RAM page sizes"), fields.u64("target page size"))


@dataclass(frozen=True)
class PostcopyListen(CommandRecord):
    """Sensitise the RAM; the listen thread takes the stream over."""

    command = wire.Command.POSTCOPY_LISTEN


@dataclass(frozen=True)
class PostcopyRun(CommandRecord):
    """Start the CPUs; the last command of the package."""

    command = wire.Command.POSTCOPY_RUN


@dataclass(frozen=True)
class PostcopyRamDiscard(CommandRecord):
    """Discard ranges of one RAMBlock: (start in the block, length), both in bytes, 1 to 12 of them.

    version u8 = 0 | block str8 | 0 u8 | n * (start be64, length be64)
    """

    command = wire.Command.POSTCOPY_RAM_DISCARD
    block: str
    ranges: tuple[tuple[int, int], ...]

    def payload(self) -> bytes:
        if not 1 <= len(self.ranges) <= wire.MAX_DISCARDS_PER_COMMAND:
            expected = f"1 to {wire.MAX_DISCARDS_PER_COMMAND}"
            raise IllegalRecord(f"{self.name} ranges", expected=expected, got=len(self.ranges))
        head = wire.U8.pack(wire.DISCARD_VERSION) + pack_str8(self.block, f"{self.name} block") + b"\0"
        return head + b"".join(wire.DISCARD_RANGE.pack(*pair) for pair in self.ranges)

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> PostcopyRamDiscard:
        # The smallest payload has a name of one byte and one range: 1 + 1+1 + 1 + 16.
        if length < 4 + wire.DISCARD_RANGE.size:
            raise fields.illegal("length", f"at least {4 + wire.DISCARD_RANGE.size}", length, before=2)
        end = fields.offset + length
        fields.fixed(wire.U8, wire.DISCARD_VERSION, "version")
        name_bytes = fields.u8("block length")
        # The name may not run past the payload, which has its NUL and one range after it at least.
        if fields.offset + name_bytes + 1 + wire.DISCARD_RANGE.size > end:
            raise fields.illegal("block length", "a name inside the payload", name_bytes, before=1)
        block = fields.text(fields.take(name_bytes, "block"), "block")
        fields.fixed(wire.U8, 0, "end of name")
        count, rest = divmod(end - fields.offset, wire.DISCARD_RANGE.size)
        if rest or count > wire.MAX_DISCARDS_PER_COMMAND:
            expected = f"1 to {wire.MAX_DISCARDS_PER_COMMAND} ranges of {wire.DISCARD_RANGE.size} bytes"
            raise fields.illegal("ranges", expected, f"{end - fields.offset} bytes")
        return cls(block, tuple((fields.u64("start"), fields.u64("length")) for _ in range(count)))


@dataclass(frozen=True)
class Packaged(CommandRecord):
    """A record stream of its own, which follows the command: length be32 is the payload, then the bytes."""

    command = wire.Command.PACKAGED
    content: bytes

    def payload(self) -> bytes:
        return wire.U32.pack(len(self.content))

    def encode(self) -> bytes:
        if len(self.content) > wire.MAX_PACKAGE_BYTES:
            expected = f"{wire.MAX_PACKAGE_BYTES} bytes at most"
            raise IllegalRecord(f"{self.name} length", expected=expected, got=len(self.content))
        return super().encode() + self.content

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> Packaged:
        return cls(fields.take_counted(fields.u32("length"), limits.package_bytes, "content"))


@dataclass(frozen=True)
class EnableColo(CommandRecord):
    """COLO, which we do not have; known so that it can be refused by name."""

    command = wire.Command.ENABLE_COLO


@dataclass(frozen=True)
class PostcopyResume(CommandRecord):
    """Recovery is agreed: the destination answers RESUME_ACK and asks again for what it still wants."""

    command = wire.Command.POSTCOPY_RESUME


@dataclass(frozen=True)
class RecvBitmap(CommandRecord):
    """Recovery: asks for the received map of one RAMBlock."""

    command = wire.Command.RECV_BITMAP
    block: str

    def payload(self) -> bytes:
        return pack_str8(self.block, f"{self.name} block")

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> RecvBitmap:
        name_bytes = fields.u8("block length")
        if name_bytes + 1 != length:
            raise fields.illegal("length", name_bytes + 1, length)
        return cls(fields.text(fields.take(name_bytes, "block"), "block"))


@dataclass(frozen=True)
class SwitchoverStart(CommandRecord):
    """10.x says that switchover starts; it may be ignored."""

    command = wire.Command.SWITCHOVER_START


@dataclass(frozen=True)
class _Named(CommandRecord):
    """Carries the name of a migration."""

    migration: bytes
    """16 random bytes that the source has chosen."""

    def payload(self) -> bytes:
        return self.migration

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> _Named:
        return cls(fields.take(length, "name of the migration"))


@dataclass(frozen=True)
class HandOver(_Named):
    """Pageferry: from here on the guest is started by Start only."""

    command = wire.Command.X_HAND_OVER


@dataclass(frozen=True)
class Ask(_Named):
    """Pageferry: what became of a migration whose connection broke? Answered by Fate."""

    command = wire.Command.X_ASK


@dataclass(frozen=True)
class Start(CommandRecord):
    """Pageferry: the guest is the destination's."""

    command = wire.Command.X_START


@dataclass(frozen=True)
class Keep(CommandRecord):
    """Pageferry: the guest stays at the source."""

    command = wire.Command.X_KEEP


@dataclass(frozen=True)
class PageChecksums(CommandRecord):
    """Pageferry: every page record from here on has a checksum."""

    command = wire.Command.X_PAGE_CHECKSUMS

    def payload(self) -> bytes:
        return wire.U32.pack(wire.PAGE_CHECKSUM_ALGORITHM)

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> PageChecksums:
        fields.fixed(wire.U32, wire.PAGE_CHECKSUM_ALGORITHM, "algorithm")
        return cls()


@dataclass(frozen=True)
class Received(CommandRecord):
    """Pageferry: what the source takes the received maps for, as their digest."""

    command = wire.Command.X_RECEIVED
    digest: int

    def payload(self) -> bytes:
        return wire.U64.pack(self.digest)

    @classmethod
    def read(cls, fields: FieldReader, length: int, limits: Limits) -> Received:
        return cls(fields.u64("digest"))


COMMANDS: dict[wire.Command, type[CommandRecord]] = {
    record.command: record
    for record in (
        OpenReturnPath,
        Ping,
        PostcopyAdvise,
        PostcopyListen,
        PostcopyRun,
        PostcopyRamDiscard,
        Packaged,
        EnableColo,
        PostcopyResume,
        RecvBitmap,
        SwitchoverStart,
        HandOver,
        Start,
        Keep,
        Ask,
        PageChecksums,
        Received,
    )
}


def read_command(fields: FieldReader, limits: Limits) -> CommandRecord:
    """Read a command after its id byte; raises StreamError, naming the command once it is known."""
    number = fields.u16("number")
    length = fields.u16("length")
    try:
        command = wire.Command(number)
    except ValueError:
        raise fields.illegal("number", f"1 to {wire.LAST_STOCK_COMMAND}", f"{number:#x}", before=4) from None
    fields.record = command.name
    allowed = wire.COMMAND_LENGTHS[command]
    if allowed is None:
        # The shortest varying payload is a name of one byte.
        if length < 2:
            raise fields.illegal("length", "a name", length, before=2)
    elif length not in allowed:
        raise fields.illegal("length", " or ".join(map(str, allowed)), length, before=2)
    return COMMANDS[command].read(fields, length, limits)
