"""Page records: both directions, cut short, corrupted; the rules about blocks and offsets."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.byte_sources import ByteByByte
from vmm.migration import errors, wire
from vmm.migration.field_reader import Limits
from vmm.migration.ram_records import (
    EndOfBody,
    MemSize,
    Page,
    RamReader,
    RamRecord,
    RamWriter,
    ZeroPage,
    check_mem_size,
)
from vmm.vmstate import BytesSource

PAGE = wire.PAGE_SIZE_BYTES
BLOCKS = {"ram": 16 * PAGE, "pc.bios": 2 * PAGE, "é/1": PAGE}


PLACES = st.sampled_from(
    [(name, offset) for name, length in BLOCKS.items() for offset in range(0, length, PAGE)]
)
DATA = st.binary(min_size=8, max_size=8).map(lambda some: some * (PAGE // 8))
RECORDS: st.SearchStrategy[RamRecord] = st.one_of(
    st.builds(lambda place, data: Page(place[0], place[1], data), PLACES, DATA),
    st.builds(lambda place, fill: ZeroPage(place[0], place[1], fill), PLACES, st.integers(0, 255)),
    st.just(EndOfBody()),
    st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 1 << 30), max_size=4).map(
        lambda blocks: MemSize(tuple((name, pages * PAGE) for name, pages in blocks.items()))
    ),
)


@given(st.lists(RECORDS, max_size=6))
def test_records_round_trip_whole_and_byte_by_byte(records: list[RamRecord]) -> None:
    writer = RamWriter()
    raw = b"".join(writer.write(record) for record in records)
    for source in (BytesSource(raw), ByteByByte(raw)):
        reader = RamReader(source, BLOCKS)
        assert [reader.read() for _ in records] == records
        assert source.offset == len(raw)


@given(RECORDS, st.data())
def test_a_record_cut_short_is_reported(record: RamRecord, data: st.DataObject) -> None:
    raw = RamWriter().write(record)
    length = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(errors.RecordTruncated):
        RamReader(BytesSource(raw[:length]), BLOCKS).read()


@given(st.lists(RECORDS, min_size=1, max_size=3), st.data())
def test_corrupt_bytes_raise_only_stream_errors(records: list[RamRecord], data: st.DataObject) -> None:
    writer = RamWriter()
    raw = bytearray(b"".join(writer.write(record) for record in records))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, min(len(raw), 40) - 1))] = data.draw(st.integers(0, 255))
    source = BytesSource(bytes(raw))
    reader = RamReader(source, BLOCKS)
    with contextlib.suppress(errors.StreamError):
        while source.peek(1):
            record = reader.read()
            if isinstance(record, Page | ZeroPage):
                assert record.offset < BLOCKS[record.block]


def test_the_block_is_named_once_per_channel() -> None:
    writer = RamWriter()
    first, second = writer.write(ZeroPage("ram", 0)), writer.write(ZeroPage("ram", PAGE))
    assert first == bytes.fromhex("0000000000000002 03 72616d 00")
    assert second == bytes.fromhex("0000000000001022 00")
    writer.reset()
    assert writer.write(ZeroPage("ram", PAGE)) == bytes.fromhex("0000000000001002 03 72616d 00")
    reader = RamReader(BytesSource(first + second + second), BLOCKS)
    assert [reader.read(), reader.read()] == [ZeroPage("ram", 0), ZeroPage("ram", PAGE)]
    reader.reset()
    with pytest.raises(errors.IllegalRecord, match="expected a RAMBlock name, got CONTINUE"):
        reader.read()


def test_layouts() -> None:
    raw = RamWriter().write(MemSize((("ram", 0x100000), ("rom", 0x1000))))
    layout = "0000000000101004 03 72616d 0000000000100000 03 726f6d 0000000000001000"
    assert raw == bytes.fromhex(layout)
    assert RamWriter().write(EndOfBody()) == bytes.fromhex("0000000000000010")
    page = RamWriter().write(Page("ram", 0x2000, bytes(PAGE)))
    assert page == bytes.fromhex("0000000000002008 03 72616d") + bytes(PAGE)


REFUSED = [
    (
        "0000000000000000",
        errors.IllegalRecord,
        "flags: expected ZERO, PAGE, XBZRLE, MEM_SIZE or EOS, got 0x0",
    ),
    ("000000000000000a 03 72616d", errors.IllegalRecord, "flags"),
    ("0000000000000030", errors.IllegalRecord, "flags"),
    ("0000000000001010", errors.IllegalRecord, "flags"),
    ("0000000000001024", errors.IllegalRecord, "flags"),
    ("0000000000000400", errors.IllegalRecord, "flags"),
    ("0000000000000001", errors.IllegalRecord, "no obsolete FULL record"),
    ("0000000000000048", errors.IllegalRecord, "flags: expected ZERO, PAGE, XBZRLE"),
    ("0000000000000080", errors.IllegalRecord, "no RDMA"),
    ("0000000000000100", errors.IllegalRecord, "no capability compress"),
    ("0000000000000200", errors.IllegalRecord, "no capability multifd"),
    ("0000000000000008 02 7878", errors.StreamMismatch, "Unknown RAMBlock: expected one of ram"),
    ("0000000000000008 00", errors.IllegalRecord, "RAMBlock name"),
    ("0000000000010008 03 72616d", errors.IllegalRecord, "Illegal RAM offset: expected below 0x10000"),
    ("fffffffffffff002 03 72616d", errors.IllegalRecord, "Illegal RAM offset"),
    ("0000000000002004 01 61 0000000000000000", errors.IllegalRecord, "length of RAMBlock 'a'"),
    ("0000000000002004 01 61 0000000000003000", errors.IllegalRecord, "length of RAMBlock 'a'"),
    ("0000000000002004 01 61 0000000000000800", errors.IllegalRecord, "length of RAMBlock 'a'"),
    (
        "0000000000002004 01 61 0000000000001000 01 61 0000000000001000",
        errors.IllegalRecord,
        "expected each block once, got a",
    ),
]


@pytest.mark.parametrize(("layout", "error", "text"), REFUSED)
def test_a_bad_record_is_refused_with_what_and_where(
    layout: str, error: type[errors.StreamError], text: str
) -> None:
    with pytest.raises(error) as caught:
        RamReader(BytesSource(bytes.fromhex(layout)), BLOCKS).read()
    assert text in str(caught.value)


def test_too_many_blocks_are_refused() -> None:
    raw = RamWriter().write(MemSize((("a", PAGE), ("b", PAGE), ("c", PAGE))))
    with pytest.raises(errors.LimitExceeded):
        RamReader(BytesSource(raw), BLOCKS, Limits(ram_blocks=2)).read()


@pytest.mark.parametrize(
    "record",
    [
        Page("ram", 0, b"short"),
        Page("ram", 1, bytes(PAGE)),
        ZeroPage("ram", -PAGE),
        ZeroPage("", 0),
        MemSize((("ram", 100),)),
        MemSize((("ram", 0),)),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(record: RamRecord) -> None:
    writer = RamWriter()
    with pytest.raises(errors.IllegalRecord):
        writer.write(record)


def test_the_sources_blocks_must_be_ours() -> None:
    check_mem_size(MemSize((("ram", 16 * PAGE),)), BLOCKS)
    with pytest.raises(errors.StreamMismatch, match="Unknown ramblock 'vga', cannot accept migration"):
        check_mem_size(MemSize((("vga", PAGE),)), BLOCKS)
    with pytest.raises(errors.StreamMismatch, match=r"Length mismatch of RAMBlock 'ram'") as caught:
        check_mem_size(MemSize((("ram", PAGE),)), BLOCKS, 21)
    assert (caught.value.expected, caught.value.got, caught.value.offset) == ("0x10000", "0x1000", 21)
