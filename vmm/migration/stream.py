"""Records of the migration stream <-> bytes: one class each, `encode` one way and `read_record` the other.

    header | configuration | (command | section)* | EOF [ | vmdescription ]

    section = START or FULL header, body, footer   the id is chosen by the sender, and names the section
            | PART or END header, body, footer      from then on

The readers go straight down the layout of `wire.py` over a ByteSource, and raise nothing but StreamError
(`errors.py`), which says what was wrong and at which byte. The body of a section has no length: whoever owns
the section reads it (`vmm.vmstate` for devices, `ram_records.py` or the page pump for `ram`), then comes
`read_footer`. Commands have their own file.

Source: QEMU 7.2 migration/savevm.c (qemu_loadvm_state_main, save_section_header, vmstate_configuration).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vmm.migration import wire
from vmm.migration.commands import CommandRecord, read_command
from vmm.migration.errors import IllegalRecord, NotAMigrationStream, StreamMismatch
from vmm.migration.field_reader import FieldReader, Limits, pack_str8
from vmm.migration.wire import RecordType

if TYPE_CHECKING:
    from vmm.vmstate import ByteSource

__all__ = [
    "Configuration",
    "EndOfStream",
    "Header",
    "Limits",
    "Record",
    "SectionEnd",
    "SectionFooter",
    "SectionFull",
    "SectionPart",
    "SectionStart",
    "SectionTable",
    "VmDescription",
    "encode",
    "read_footer",
    "read_header",
    "read_record",
    "read_vmdescription",
]


@dataclass(frozen=True)
class Header:
    """The first eight bytes of a stream."""

    version: int = wire.VERSION

    def encode(self) -> bytes:
        return wire.HEADER.pack(wire.MAGIC, self.version)


@dataclass(frozen=True)
class Configuration:
    """What the destination must have been started with.

    `capabilities` are the names of those that both sides must have alike, None if the source sends no list;
    `uuid` is 16 bytes.
    """

    machine: str
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None

    def encode(self) -> bytes:
        machine = self.machine.encode()
        parts = [wire.U8.pack(RecordType.CONFIGURATION), wire.U32.pack(len(machine)), machine]
        if self.target_page_bits is not None:
            body = wire.U32.pack(self.target_page_bits)
            parts += _subsection(wire.CONFIGURATION_TARGET_PAGE_BITS, body)
        if self.capabilities is not None:
            names = [pack_str8(name, "capability name") for name in self.capabilities]
            body = wire.U32.pack(len(names)) + b"".join(names)
            parts += _subsection(wire.CONFIGURATION_CAPABILITIES, body)
        if self.uuid is not None:
            if len(self.uuid) != wire.UUID_BYTES:
                raise IllegalRecord("configuration UUID", expected=wire.UUID_BYTES, got=len(self.uuid))
            parts += _subsection(wire.CONFIGURATION_UUID, self.uuid)
        return b"".join(parts)

    @classmethod
    def read(cls, fields: FieldReader, source: ByteSource, limits: Limits) -> Configuration:
        length = fields.u32("length")
        raw = fields.take_counted(length, limits.machine_name_bytes, "machine name")
        machine = fields.text(raw, "machine name")
        page_bits, capabilities, uuid = None, None, None
        seen: set[str] = set()
        while source.peek(1) == wire.U8.pack(RecordType.SUBSECTION):
            fields.u8("subsection")
            name = fields.str8("subsection name")
            if name in seen:
                raise fields.illegal("subsection", "each once", name)
            seen.add(name)
            fields.fixed(wire.U32, 1, f"version of {name}")
            match name:
                case wire.CONFIGURATION_TARGET_PAGE_BITS:
                    page_bits = fields.u32(name)
                case wire.CONFIGURATION_CAPABILITIES:
                    count = fields.u32("capability count")
                    fields.check_limit(count, limits.capabilities, "capability count")
                    capabilities = tuple(fields.str8("capability name") for _ in range(count))
                case wire.CONFIGURATION_UUID:
                    uuid = fields.take(wire.UUID_BYTES, "UUID")
                case _:
                    raise fields.illegal("subsection", "one that QEMU 7.2 has", name)
        return cls(machine, page_bits, capabilities, uuid)


def _subsection(name: str, body: bytes) -> list[bytes]:
    """The parts of a subsection of the configuration; all of them have version 1."""
    return [wire.U8.pack(RecordType.SUBSECTION), pack_str8(name, "subsection name"), wire.U32.pack(1), body]


@dataclass(frozen=True)
class _SectionHead:
    """A section that introduces itself."""

    record_type: ClassVar[RecordType]
    section_id: int
    idstr: str
    instance_id: int
    version_id: int

    def encode(self) -> bytes:
        return (
            wire.U8.pack(self.record_type)
            + wire.SECTION_ID.pack(self.section_id)
            + pack_str8(self.idstr, "section name")
            + wire.SECTION_NUMBERS.pack(self.instance_id, self.version_id)
        )


@dataclass(frozen=True)
class SectionStart(_SectionHead):
    """Set-up of an iterable section; PART and END with the same id follow."""

    record_type = RecordType.SECTION_START


@dataclass(frozen=True)
class SectionFull(_SectionHead):
    """A section that comes whole."""

    record_type = RecordType.SECTION_FULL


@dataclass(frozen=True)
class _SectionNumber:
    """A record that is only an id byte and a section id."""

    record_type: ClassVar[RecordType]
    section_id: int

    def encode(self) -> bytes:
        return wire.U8.pack(self.record_type) + wire.SECTION_ID.pack(self.section_id)


@dataclass(frozen=True)
class SectionPart(_SectionNumber):
    """More of an iterable section."""

    record_type = RecordType.SECTION_PART


@dataclass(frozen=True)
class SectionEnd(_SectionNumber):
    """The last of an iterable section."""

    record_type = RecordType.SECTION_END


@dataclass(frozen=True)
class SectionFooter(_SectionNumber):
    """Ends every section's body; names the section again."""

    record_type = RecordType.SECTION_FOOTER


@dataclass(frozen=True)
class EndOfStream:
    """The last record of a stream or a package."""

    def encode(self) -> bytes:
        return wire.U8.pack(RecordType.EOF)


@dataclass(frozen=True)
class VmDescription:
    """The description of the device sections, JSON as bytes (`vmdescription.py`); no loader needs it."""

    json: bytes

    def encode(self) -> bytes:
        return wire.U8.pack(RecordType.VMDESCRIPTION) + wire.U32.pack(len(self.json)) + self.json


Record = (
    Configuration
    | SectionStart
    | SectionPart
    | SectionEnd
    | SectionFull
    | SectionFooter
    | CommandRecord
    | EndOfStream
    | VmDescription
)


def encode(record: Header | Record) -> bytes:
    """The bytes of a record; raises IllegalRecord if a field does not fit the layout."""
    return record.encode()


def read_header(source: ByteSource) -> Header:
    """Read a stream's first eight bytes; raises NotAMigrationStream if they are not a header of version 3."""
    fields = FieldReader(source, "stream header")
    magic = fields.u32("magic")
    if magic != wire.MAGIC:
        raise NotAMigrationStream(
            "Not a migration stream", offset=0, expected=f"{wire.MAGIC:#010x}", got=f"{magic:#010x}"
        )
    version = fields.u32("version")
    if version == wire.VERSION_OBSOLETE:
        text = "SaveVM v2 format is obsolete and don't work anymore"
        raise NotAMigrationStream(text, offset=4, expected=wire.VERSION, got=version)
    if version != wire.VERSION:
        text = "Unsupported migration stream version"
        raise NotAMigrationStream(text, offset=4, expected=wire.VERSION, got=version)
    return Header(version)


def read_record(source: ByteSource, limits: Limits | None = None) -> Record:
    """Read the next record, for a section its header only.

    Raises StreamError: RecordTruncated, IllegalRecord, LimitExceeded.
    """
    limits = limits or Limits()
    fields = FieldReader(source, "record")
    number = fields.u8("type")
    try:
        record_type = RecordType(number)
    except ValueError:
        raise fields.illegal("type", "a record", f"{number:#04x}", before=1) from None
    fields.record = record_type.name
    match record_type:
        case RecordType.EOF:
            return EndOfStream()
        case RecordType.SECTION_START:
            return SectionStart(*_read_section_head(fields))
        case RecordType.SECTION_FULL:
            return SectionFull(*_read_section_head(fields))
        case RecordType.SECTION_PART:
            return SectionPart(fields.u32("section id"))
        case RecordType.SECTION_END:
            return SectionEnd(fields.u32("section id"))
        case RecordType.SECTION_FOOTER:
            return SectionFooter(fields.u32("section id"))
        case RecordType.COMMAND:
            return read_command(fields, limits)
        case RecordType.CONFIGURATION:
            return Configuration.read(fields, source, limits)
        case RecordType.VMDESCRIPTION:
            length = fields.u32("length")
            return VmDescription(fields.take_counted(length, limits.vmdescription_bytes, "JSON"))
        case RecordType.SUBSECTION:
            raise fields.illegal("type", "a record", "a subsection outside a section", before=1)


def _read_section_head(fields: FieldReader) -> tuple[int, str, int, int]:
    return (
        fields.u32("section id"),
        fields.str8("section name"),
        fields.u32("instance id"),
        fields.u32("version id"),
    )


def read_footer(source: ByteSource, section_id: int, name: str) -> None:
    """Read the footer after the body of section `section_id`, called `name`; raises IllegalRecord."""
    fields = FieldReader(source, f"Section footer for {name}")
    record_type = fields.u8("type")
    if record_type != RecordType.SECTION_FOOTER:
        raise IllegalRecord(
            f"Missing section footer for {name}",
            offset=fields.offset - 1,
            expected=f"{RecordType.SECTION_FOOTER.value:#04x}",
            got=f"{record_type:#04x}",
        )
    got = fields.u32("section id")
    if got != section_id:
        raise IllegalRecord(
            f"Mismatched section id in footer for {name}",
            offset=fields.offset - wire.SECTION_ID.size,
            expected=section_id,
            got=got,
        )


def read_vmdescription(source: ByteSource, limits: Limits | None = None) -> VmDescription | None:
    """Read what may follow EOF in precopy; None if the stream has ended, which is no error (as in QEMU)."""
    if not source.peek(1):
        return None
    record = read_record(source, limits)
    if isinstance(record, VmDescription):
        return record
    raise IllegalRecord(
        "Record after EOF", offset=source.offset, expected="VMDESCRIPTION", got=type(record).__name__
    )


class SectionTable:
    """Which section a section id means: the sender's numbers against the sections that this machine has.

    `versions` maps (idstr, instance_id) to the lowest and the highest version that can be loaded.
    """

    def __init__(self, versions: dict[tuple[str, int], tuple[int, int]]) -> None:
        self._versions = versions
        self._open: dict[int, SectionStart | SectionFull] = {}

    def introduce(self, record: SectionStart | SectionFull, offset: int | None = None) -> None:
        """Remember what `record` introduces; raises StreamMismatch if this machine cannot take it."""
        name = f"'{record.idstr}' {record.instance_id}"
        versions = self._versions.get((record.idstr, record.instance_id))
        if versions is None:
            text = f"Unknown savevm section or instance {name}"
            known = ", ".join(f"{idstr}/{instance}" for idstr, instance in self._versions)
            raise StreamMismatch(
                text, offset=offset, expected=f"one of {known}", got=f"version {record.version_id}"
            )
        lowest, highest = versions
        if not lowest <= record.version_id <= highest:
            text = f"savevm: unsupported version of section {name}"
            expected = f"{lowest} to {highest}"
            raise StreamMismatch(text, offset=offset, expected=expected, got=record.version_id)
        if record.section_id in self._open:
            raise IllegalRecord("Section id", offset=offset, expected="a new one", got=record.section_id)
        self._open[record.section_id] = record

    def find(self, record: SectionPart | SectionEnd, offset: int | None = None) -> SectionStart:
        """The section that `record` goes on with; raises IllegalRecord if none was started with its id."""
        section = self._open.get(record.section_id)
        if not isinstance(section, SectionStart):
            known = ", ".join(str(number) for number in self._open) or "none"
            raise IllegalRecord(
                "Unknown savevm section", offset=offset, expected=f"one of {known}", got=record.section_id
            )
        return section
