"""Walks a migration stream record by record, whoever wrote it, and says where it breaks.

    walk(source) -> Item, Item, ...        one for each record, in the order of the stream

A section's body has no length of its own. It is read by the first of these that is there:
1. the tables of this project (our own devices, and those of stock that `vmm.migration` keeps);
2. the stream's own vmdescription, which precopy streams carry at their end: any machine of QEMU;
3. its footer, found by searching: the bytes are shown, their meaning is not known.

Layout and sources: `vmm/migration/wire.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vmm.cpu.state import CPU_COMMON_DESCRIPTION, CPU_DESCRIPTION
from vmm.devices.control_ports import Port92
from vmm.devices.pic import PIC_DESCRIPTION
from vmm.devices.pit import PIT_DESCRIPTION
from vmm.devices.rtc import RTC_DESCRIPTION
from vmm.devices.serial_state import SERIAL_DESCRIPTION
from vmm.errors import PageferryError, StreamTruncated, VMStateError
from vmm.machine_sections import GlobalStateSection, TimerSection
from vmm.migration import commands, stream, wire
from vmm.migration.ram_records import EndOfBody, MemSize, Page, RamReader, RamRecord, XbzrlePage, ZeroPage
from vmm.migration.stock_sections import STOCK_SECTIONS
from vmm.vmstate import ByteSource, BytesSource, Description, Values, decode

__all__ = [
    "Bytes",
    "Item",
    "MappedSource",
    "PageTaker",
    "StreamBroken",
    "read_described",
    "vmdescription",
    "walk",
]

DESCRIPTIONS: dict[str, Description] = {
    description.name: description
    for description in (
        CPU_DESCRIPTION,
        CPU_COMMON_DESCRIPTION,
        TimerSection.description,
        GlobalStateSection.description,
        SERIAL_DESCRIPTION,
        Port92.description,
        PIC_DESCRIPTION,
        PIT_DESCRIPTION,
        RTC_DESCRIPTION,
        *(section.description for section in STOCK_SECTIONS),
    )
}
VMDESCRIPTION_HEAD = b'{"'
UNKNOWN_BODY_LIMIT = 1 << 20
"""How far a footer is searched for; arbitrary, far above any device."""


class StreamBroken(Exception):
    """The stream cannot be read further: `offset` is where, `inside` the record that was being read."""

    def __init__(self, offset: int, inside: str, reason: str) -> None:
        super().__init__(f"Broken at offset {offset} ({offset:#x}), in {inside}: {reason}")
        self.offset = offset
        self.inside = inside
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """One record: `offset` of its first byte, `depth` 1 inside a package, what it is, and its values."""

    offset: int
    depth: int
    kind: str
    text: str
    values: Values = field(default_factory=dict)
    section: str = ""
    """ "name/instance" of a device section whose values these are."""


class Bytes(Protocol):
    """What holds a stream: bytes, or a mapped file."""

    def __getitem__(self, index: slice, /) -> bytes: ...
    def __len__(self) -> int: ...
    def rfind(self, sub: bytes, start: int = ..., end: int = ..., /) -> int: ...
    def find(self, sub: bytes, start: int = ..., end: int = ..., /) -> int: ...


_KINDS = {Page: "pages", ZeroPage: "zero pages", XbzrlePage: "XBZRLE pages"}


class PageTaker(Protocol):
    """Who wants the pages."""

    def blocks(self, sizes: MemSize, /) -> None: ...
    def page(self, block: str, offset: int, data: bytes, /) -> None: ...
    def difference(self, block: str, offset: int, encoded: bytes, /) -> None: ...


class MappedSource:
    """A ByteSource over a part of a stream; offsets count from the stream's first byte."""

    def __init__(self, data: Bytes, start: int = 0, end: int | None = None) -> None:
        self.data = data
        self.offset = start
        self.end = len(data) if end is None else end

    def peek(self, n: int, /) -> bytes:
        return self.data[self.offset : min(self.offset + n, self.end)]

    def read(self, n: int, /) -> bytes:
        taken = self.peek(n)
        if len(taken) < n:
            raise StreamTruncated(n, len(taken), offset=self.offset)
        self.offset += n
        return taken


def walk(data: Bytes, pages: PageTaker | None = None, *, each_page: bool = False) -> Iterator[Item]:
    """Every record of the stream. Raises StreamBroken, after the items before the damage were given."""
    return _Walker(data, pages, each_page).run()


class _Walker:
    """The state of one walk."""

    def __init__(self, data: Bytes, pages: PageTaker | None, each_page: bool) -> None:
        self._data = data
        self._source = MappedSource(data)
        self._pages = pages
        self._each_page = each_page
        self._lengths: dict[str, int] = {}
        self._ram = RamReader(self._source, self._lengths)
        self._names: dict[int, tuple[str, int]] = {}
        self._described = vmdescription(data)
        self._inside = "stream header"

    def run(self) -> Iterator[Item]:
        try:
            yield Item(0, 0, "HEADER", f"version {stream.read_header(self._source).version}")
            yield from self._records(self._source, 0)
            if self._source.peek(1):
                offset = self._source.offset
                self._inside = "what follows EOF"
                stream.read_vmdescription(self._source)
                length = self._source.offset - offset
                yield Item(offset, 0, "VMDESCRIPTION", f"{length} bytes", self._described or {})
            if left := self._source.end - self._source.offset:
                yield Item(self._source.offset, 0, "REST", f"{left} bytes that belong to no record")
        except PageferryError as error:
            where = getattr(error, "offset", None)
            at = self._source.offset if where is None else where
            raise StreamBroken(at, self._inside, str(error)) from error

    def _records(self, source: MappedSource, depth: int) -> Iterator[Item]:
        while True:
            offset = source.offset
            self._inside = f"the record at offset {offset}"
            record = stream.read_record(source)
            match record:
                case stream.EndOfStream():
                    yield Item(offset, depth, "EOF", "")
                    return
                case stream.Configuration():
                    yield Item(offset, depth, "CONFIGURATION", _show_configuration(record))
                case stream.SectionStart() | stream.SectionFull():
                    self._names[record.section_id] = (record.idstr, record.instance_id)
                    yield from self._section(record, source, offset, depth)
                case stream.SectionPart() | stream.SectionEnd():
                    yield from self._part(record, source, offset, depth)
                case commands.Packaged(content):
                    yield Item(offset, depth, "PACKAGED", f"{len(content)} bytes")
                    inner = MappedSource(self._data, source.offset - len(content), source.offset)
                    yield from self._package(inner, depth + 1)
                case commands.CommandRecord():
                    yield Item(offset, depth, record.name, _show_command(record))
                case _:
                    yield Item(offset, depth, type(record).__name__, "")

    def _package(self, inner: MappedSource, depth: int) -> Iterator[Item]:
        """A package ends with RUN, not with EOF: its last byte is its end."""
        records = self._records(inner, depth)
        while inner.offset < inner.end:
            yield next(records)

    # ---- sections

    def _section(
        self, record: stream.SectionStart | stream.SectionFull, source: MappedSource, offset: int, depth: int
    ) -> Iterator[Item]:
        kind = "START" if isinstance(record, stream.SectionStart) else "FULL"
        name = f"{record.idstr}/{record.instance_id}"
        head = f"{name} version {record.version_id}, section id {record.section_id}"
        self._inside = f"section '{name}' that begins at offset {offset}"
        if kind == "START":
            yield from self._start(record, source, offset, depth, head)
            return
        begin = source.offset
        values, how = self._body(record, source)
        text = f"{head}, {source.offset - begin} bytes{how}"
        stream.read_footer(source, record.section_id, name)
        yield Item(offset, depth, kind, text, values, section=name)

    def _start(
        self, record: stream.SectionStart | stream.SectionFull, source: MappedSource, offset: int,
        depth: int, head: str,
    ) -> Iterator[Item]:  # fmt: skip
        if record.idstr != wire.RAM_IDSTR:
            body = self._until_footer(source, record.section_id)
            stream.read_footer(source, record.section_id, record.idstr)
            yield Item(offset, depth, "START", f"{head}, {len(body)} bytes of unknown layout")
            return
        yield Item(offset, depth, "START", head)
        yield from self._ram_body(record.section_id, source, depth)

    def _part(
        self, record: stream.SectionPart | stream.SectionEnd, source: MappedSource, offset: int, depth: int
    ) -> Iterator[Item]:
        kind = "PART" if isinstance(record, stream.SectionPart) else "END"
        idstr, instance = self._names.get(record.section_id, ("never started", 0))
        self._inside = f"the {kind} of '{idstr}/{instance}' that begins at offset {offset}"
        if idstr != wire.RAM_IDSTR:
            body = self._until_footer(source, record.section_id)
            stream.read_footer(source, record.section_id, idstr)
            yield Item(offset, depth, kind, f"{idstr}/{instance}, {len(body)} bytes of unknown layout")
            return
        yield Item(offset, depth, kind, f"ram, section id {record.section_id}")
        yield from self._ram_body(record.section_id, source, depth)

    def _ram_body(self, section_id: int, source: MappedSource, depth: int) -> Iterator[Item]:
        counts = dict.fromkeys(_KINDS.values(), 0)
        first = source.offset
        while True:
            offset = source.offset
            record = self._ram.read()
            if isinstance(record, EndOfBody):
                break
            if isinstance(record, MemSize):
                self._lengths.update(record.blocks)
                if self._pages:
                    self._pages.blocks(record)
                for name, length in record.blocks:
                    yield Item(offset, depth + 1, "BLOCK", f"'{name}' {length} bytes")
                continue
            counts[_KINDS[type(record)]] += 1
            self._take(record)
            if self._each_page:
                yield Item(offset, depth + 1, *_show_page(record))
        if sum(counts.values()):
            text = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            yield Item(first, depth + 1, "PAGES", text)
        stream.read_footer(source, section_id, wire.RAM_IDSTR)

    def _take(self, record: RamRecord) -> None:
        if self._pages is None:
            return
        if isinstance(record, Page):
            self._pages.page(record.block, record.offset, record.data)
        elif isinstance(record, ZeroPage):
            self._pages.page(record.block, record.offset, bytes([record.fill]) * wire.PAGE_SIZE_BYTES)
        elif isinstance(record, XbzrlePage):
            self._pages.difference(record.block, record.offset, record.encoded)

    # ---- bodies of devices

    def _body(
        self, record: stream.SectionFull | stream.SectionStart, source: MappedSource
    ) -> tuple[Values, str]:
        description = DESCRIPTIONS.get(record.idstr)
        shown = self._device(record.idstr, record.instance_id)
        begin = source.offset
        if description is not None:
            try:
                return decode(description, source, record.version_id), ""
            except VMStateError:
                if shown is None:
                    raise
                source.offset = begin  # a version or subsection that we do not know, but the stream does
        if shown is not None:
            return read_described(shown, source), ", read by the stream's vmdescription"
        body = self._until_footer(source, record.section_id)
        return {"bytes": body}, " up to its footer: its layout is not known"

    def _device(self, name: str, instance: int) -> dict[str, Any] | None:
        for device in (self._described or {}).get("devices", ()):
            if (device.get("name"), device.get("instance_id")) == (name, instance):
                return dict(device)
        return None

    def _until_footer(self, source: MappedSource, section_id: int) -> bytes:
        footer = wire.U8.pack(wire.RecordType.SECTION_FOOTER) + wire.SECTION_ID.pack(section_id)
        end = min(source.end, source.offset + UNKNOWN_BODY_LIMIT)
        at = self._data.find(footer, source.offset, end)
        if at < 0:
            raise StreamTruncated(UNKNOWN_BODY_LIMIT, end - source.offset, offset=source.offset)
        return source.read(at - source.offset)


def vmdescription(data: Bytes) -> dict[str, Any] | None:
    """The JSON at the end of the stream, None if there is none."""
    at = data.rfind(b'"page_size"')
    at = data.rfind(VMDESCRIPTION_HEAD, 0, at + 2) if at >= 0 else -1
    if at < 0:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(bytes(data[at : len(data)]).decode("utf-8", "replace"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# ---- reading by a vmdescription


def read_described(shown: dict[str, Any], source: ByteSource) -> Values:
    """A body of which the stream says itself what it contains."""
    if "fields" not in shown:  # a device of before VMState: only its size is told
        return {"bytes": source.read(int(shown["size"]))}
    values: Values = {}
    for each in shown["fields"]:
        count = int(each.get("array_len", 1))
        elements = [_read_field(each, source) for _ in range(count)]
        name = str(each["name"])
        if "index" in each:
            name = f"{name}[{each['index']}]"
        values[name] = elements if "array_len" in each else elements[0]
    for each in shown.get("subsections", ()):
        name = str(each["vmsd_name"])
        source.read(2 + len(name.encode()) + wire.U32.size)
        values[name] = read_described(each, source)
    return values


def _read_field(each: dict[str, Any], source: ByteSource) -> Any:
    raw = source.read(int(each["size"]))
    if "struct" in each:
        return read_described(each["struct"], BytesSource(raw))
    if "fields" in each:  # values that stock has brought into another form for the stream
        return read_described(each, BytesSource(raw))
    kind = str(each.get("type", ""))
    if kind.startswith(("uint", "int", "bool", "timer")) and len(raw) in (1, 2, 4, 8):
        return int.from_bytes(raw, "big", signed=kind.startswith(("int", "timer")))
    return raw


# ---- showing


def _show_configuration(record: stream.Configuration) -> str:
    parts = [f"machine '{record.machine}'"]
    if record.target_page_bits is not None:
        parts.append(f"target page bits {record.target_page_bits}")
    if record.capabilities is not None:
        parts.append("capabilities " + (", ".join(record.capabilities) or "none"))
    if record.uuid is not None:
        parts.append(f"uuid {record.uuid.hex()}")
    return ", ".join(parts)


def _show_command(record: commands.CommandRecord) -> str:
    match record:
        case commands.Ping(value):
            return f"{value:#x}"
        case commands.PostcopyAdvise(ram, target):
            return f"page sizes {ram}, {target}"
        case commands.PostcopyRamDiscard(block, ranges):
            shown = ", ".join(f"{start:#x}+{length:#x}" for start, length in ranges)
            return f"'{block}' {shown}"
        case commands.RecvBitmap(block):
            return f"'{block}'"
    return ""


def _show_page(record: RamRecord) -> tuple[str, str]:
    if isinstance(record, Page):
        return "PAGE", f"'{record.block}' {record.offset:#x}"
    if isinstance(record, XbzrlePage):
        return "XBZRLE", f"'{record.block}' {record.offset:#x} {len(record.encoded)} bytes"
    assert isinstance(record, ZeroPage)
    return "ZERO", f"'{record.block}' {record.offset:#x}" + (
        f" fill {record.fill:#04x}" if record.fill else ""
    )
