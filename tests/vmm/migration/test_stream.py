"""Records of the migration stream: both directions, cut short at every byte, and corrupted."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.byte_sources import ByteByByte
from vmm.migration import commands as cmd
from vmm.migration import errors, stream, wire
from vmm.vmstate import BytesSource

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)
NAME_OF_MIGRATION = st.binary(min_size=16, max_size=16)

COMMANDS = st.one_of(
    st.builds(cmd.OpenReturnPath),
    st.builds(cmd.Ping, U32),
    st.builds(cmd.PostcopyAdvise, U64, U64),
    st.just(cmd.PostcopyAdvise(None, None)),
    st.builds(cmd.PostcopyListen),
    st.builds(cmd.PostcopyRun),
    st.builds(
        cmd.PostcopyRamDiscard,
        NAMES,
        st.lists(st.tuples(U64, U64), min_size=1, max_size=12).map(tuple),
    ),
    st.builds(cmd.Packaged, st.binary(max_size=300)),
    st.builds(cmd.EnableColo),
    st.builds(cmd.PostcopyResume),
    st.builds(cmd.RecvBitmap, NAMES),
    st.builds(cmd.SwitchoverStart),
    st.builds(cmd.HandOver, NAME_OF_MIGRATION),
    st.builds(cmd.Start),
    st.builds(cmd.Keep),
    st.builds(cmd.Ask, NAME_OF_MIGRATION),
)
RECORDS = st.one_of(
    COMMANDS,
    st.builds(
        stream.Configuration,
        NAMES,
        st.none() | U32,
        st.none() | st.lists(NAMES, max_size=4).map(tuple),
        st.none() | st.binary(min_size=16, max_size=16),
    ),
    st.builds(stream.SectionStart, U32, NAMES, U32, U32),
    st.builds(stream.SectionFull, U32, NAMES, U32, U32),
    st.builds(stream.SectionPart, U32),
    st.builds(stream.SectionEnd, U32),
    st.builds(stream.SectionFooter, U32),
    st.builds(stream.EndOfStream),
    st.builds(stream.VmDescription, st.binary(max_size=300)),
)

EXAMPLES: list[tuple[stream.Record, str]] = [
    (stream.Configuration("microvm"), "07 00000007 6d6963726f766d"),
    (
        stream.Configuration("none", None, ("x-ignore-shared",)),
        "07 00000004 6e6f6e65 05 1a"
        + b"configuration/capabilities".hex()
        + "00000001 00000001 0f"
        + b"x-ignore-shared".hex(),
    ),
    (stream.SectionStart(2, "ram", 0, 4), "01 00000002 03 72616d 00000000 00000004"),
    (stream.SectionPart(2), "02 00000002"),
    (stream.SectionEnd(2), "03 00000002"),
    (stream.SectionFull(5, "cpu", 0, 12), "04 00000005 03 637075 00000000 0000000c"),
    (stream.SectionFooter(2), "7e 00000002"),
    (stream.EndOfStream(), "00"),
    (stream.VmDescription(b"{}"), "06 00000002 7b7d"),
    (cmd.OpenReturnPath(), "08 0001 0000"),
    (cmd.Ping(1), "08 0002 0004 00000001"),
    (cmd.PostcopyAdvise(), "08 0003 0010 0000000000001000 0000000000001000"),
    (cmd.PostcopyAdvise(None, None), "08 0003 0000"),
    (cmd.PostcopyListen(), "08 0004 0000"),
    (cmd.PostcopyRun(), "08 0005 0000"),
    (
        cmd.PostcopyRamDiscard("ram", ((0x1000, 0x2000),)),
        "08 0006 0016 00 03 72616d 00 0000000000001000 0000000000002000",
    ),
    (cmd.Packaged(b"\x08\x00\x04\x00\x00"), "08 0007 0004 00000005 0800040000"),
    (cmd.EnableColo(), "08 0008 0000"),
    (cmd.PostcopyResume(), "08 0009 0000"),
    (cmd.RecvBitmap("ram"), "08 000a 0004 03 72616d"),
    (cmd.SwitchoverStart(), "08 000b 0000"),
    (cmd.HandOver(bytes(range(16))), "08 5001 0010 000102030405060708090a0b0c0d0e0f"),
    (cmd.Start(), "08 5002 0000"),
    (cmd.Keep(), "08 5003 0000"),
    (cmd.Ask(bytes(16)), "08 5004 0010" + "00" * 16),
    (cmd.PageChecksums(), "08 5005 0004 00000001"),
    (cmd.Received(0x0123456789ABCDEF), "08 5006 0008 0123456789abcdef"),
]


@pytest.mark.parametrize(("record", "layout"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_each_record_has_the_bytes_of_the_format(record: stream.Record, layout: str) -> None:
    assert stream.encode(record) == bytes.fromhex(layout)
    assert stream.read_record(BytesSource(bytes.fromhex(layout))) == record


def test_every_record_and_command_has_an_example() -> None:
    assert {type(record) for record, _ in EXAMPLES} == {
        *cmd.COMMANDS.values(),
        stream.Configuration,
        stream.SectionStart,
        stream.SectionPart,
        stream.SectionEnd,
        stream.SectionFull,
        stream.SectionFooter,
        stream.EndOfStream,
        stream.VmDescription,
    }
    assert set(cmd.COMMANDS) == set(wire.Command) == set(wire.COMMAND_LENGTHS)


@given(st.lists(RECORDS, max_size=5))
def test_records_round_trip_whole_and_byte_by_byte(records: list[stream.Record]) -> None:
    raw = b"".join(stream.encode(record) for record in records)
    for source in (BytesSource(raw), ByteByByte(raw)):
        assert [stream.read_record(source) for _ in records] == records
        assert source.offset == len(raw)
        assert source.peek(1) == b""


@given(RECORDS)
def test_a_record_cut_short_is_reported_at_every_byte(record: stream.Record) -> None:
    raw = stream.encode(record)
    for length in range(len(raw)):
        got = read_or_error(raw[:length])
        if isinstance(got, errors.RecordTruncated):
            assert got.what
            assert got.offset is not None
            assert got.offset <= length
        else:
            # Only a configuration can end early: its subsections are optional.
            assert isinstance(got, stream.Configuration)
            assert raw.startswith(stream.encode(got))


def read_or_error(raw: bytes) -> stream.Record | errors.StreamError:
    """What the bytes mean; nothing but a documented error that says where may come out."""
    try:
        return stream.read_record(BytesSource(raw))
    except errors.StreamError as error:
        return error


@given(RECORDS, st.data())
def test_corrupt_bytes_raise_only_stream_errors(record: stream.Record, data: st.DataObject) -> None:
    raw = bytearray(stream.encode(record))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    got = read_or_error(bytes(raw))
    if isinstance(got, errors.StreamError):
        assert got.offset is not None
    elif not isinstance(got, stream.Configuration):
        assert bytes(raw).startswith(stream.encode(got))


@given(st.binary(max_size=80))
def test_arbitrary_bytes_raise_only_stream_errors(raw: bytes) -> None:
    source = BytesSource(raw)
    if not raw.startswith(stream.encode(stream.Header())):
        with pytest.raises(errors.StreamError):
            stream.read_header(source)
    source = BytesSource(raw)
    with contextlib.suppress(errors.StreamError):
        while source.peek(1):
            stream.read_record(source)


REFUSED: list[tuple[str, type[errors.StreamError], str]] = [
    ("09", errors.IllegalRecord, "record type: expected a record, got 0x09 (at offset 0)"),
    ("05", errors.IllegalRecord, "SUBSECTION type"),
    ("08 0000 0000", errors.IllegalRecord, "COMMAND number: expected 1 to 11, got 0x0 (at offset 1)"),
    ("08 000c 0000", errors.IllegalRecord, "COMMAND number: expected 1 to 11, got 0xc"),
    ("08 0002 0005 0000000000", errors.IllegalRecord, "PING length: expected 4, got 5 (at offset 3)"),
    ("08 0003 0008", errors.IllegalRecord, "POSTCOPY_ADVISE length: expected 16 or 0, got 8"),
    ("08 0007 0004 01000001", errors.LimitExceeded, "PACKAGED content: expected 16777216 at most"),
    ("08 000a 0001 00", errors.IllegalRecord, "RECV_BITMAP length: expected a name, got 1"),
    ("08 000a 0003 03 7261", errors.IllegalRecord, "RECV_BITMAP length: expected 4, got 3"),
    ("08 0006 0004 00000000", errors.IllegalRecord, "POSTCOPY_RAM_DISCARD length: expected at least 20"),
    ("08 0006 0014 01 01 61 00" + "00" * 16, errors.IllegalRecord, "POSTCOPY_RAM_DISCARD version"),
    ("08 0006 0014 00 02 6161 00" + "00" * 16, errors.IllegalRecord, "DISCARD block length"),
    ("08 0006 0014 00 01 61 01" + "00" * 16, errors.IllegalRecord, "DISCARD end of name"),
    ("08 0006 0015 00 01 61 00" + "00" * 17, errors.IllegalRecord, "DISCARD ranges"),
    ("08 0006 00d4 00 01 61 00" + "00" * 208, errors.IllegalRecord, "DISCARD ranges"),
    ("07 00000101", errors.LimitExceeded, "CONFIGURATION machine name"),
    ("07 00000000", errors.IllegalRecord, "CONFIGURATION machine name"),
    ("07 00000001 61 05 01 62 00000001", errors.IllegalRecord, "CONFIGURATION subsection"),
    ("06 01000001", errors.LimitExceeded, "VMDESCRIPTION JSON"),
    ("01 00000001 00", errors.IllegalRecord, "SECTION_START section name: expected a name, got b''"),
    ("01 00000001 01 ff", errors.IllegalRecord, "SECTION_START section name"),
    ("01 00000001 02 6100", errors.IllegalRecord, "SECTION_START section name"),
]


@pytest.mark.parametrize(("layout", "error", "text"), REFUSED)
def test_a_bad_record_is_refused_with_what_and_where(
    layout: str, error: type[errors.StreamError], text: str
) -> None:
    with pytest.raises(error) as caught:
        stream.read_record(BytesSource(bytes.fromhex(layout)))
    assert text in str(caught.value)


def test_a_configuration_subsection_comes_once_and_in_version_1() -> None:
    raw = stream.encode(stream.Configuration("none", uuid=bytes(16)))
    twice = raw + raw[raw.index(b"\x05") :]
    with pytest.raises(errors.IllegalRecord, match="each once"):
        stream.read_record(BytesSource(twice))
    newer = raw[:-17] + b"\x02" + raw[-16:]
    with pytest.raises(errors.IllegalRecord, match="version of configuration/uuid"):
        stream.read_record(BytesSource(newer))


def test_too_many_capabilities_are_refused() -> None:
    raw = stream.encode(stream.Configuration("none", capabilities=("a", "b", "c")))
    with pytest.raises(errors.LimitExceeded):
        stream.read_record(BytesSource(raw), stream.Limits(capabilities=2))


@pytest.mark.parametrize(
    "record",
    [
        cmd.PostcopyRamDiscard("ram", ()),
        cmd.PostcopyRamDiscard("ram", ((0, 1),) * 13),
        cmd.PostcopyRamDiscard("", ((0, 1),)),
        cmd.RecvBitmap("x" * 256),
        cmd.RecvBitmap("a\0b"),
        cmd.RecvBitmap("\ud800"),
        stream.Configuration("none", uuid=b"short"),
        cmd.Packaged(bytes(wire.MAX_PACKAGE_BYTES + 1)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_what_the_format_cannot_hold_is_not_written(record: stream.Record) -> None:
    with pytest.raises(errors.IllegalRecord):
        stream.encode(record)


def test_the_longest_payload_is_the_limit_of_its_length_field() -> None:
    class Long(cmd.CommandRecord):
        command = wire.Command.PING

        def payload(self) -> bytes:
            return bytes(0x10000)

    with pytest.raises(errors.IllegalRecord, match="65535"):
        Long().encode()


def test_header() -> None:
    raw = stream.encode(stream.Header())
    assert raw == bytes.fromhex("5145564d 00000003")
    assert stream.read_header(BytesSource(raw)) == stream.Header()
    for layout, error, text in [
        ("5145564d 00000002", errors.NotAMigrationStream, "obsolete"),
        ("5145564d 00000004", errors.NotAMigrationStream, "version: expected 3, got 4"),
        (b"GET / HTTP/1.1".hex(), errors.NotAMigrationStream, "expected 0x5145564d, got 0x47455420"),
        ("514556", errors.RecordTruncated, "in stream header magic"),
    ]:
        with pytest.raises(error, match=text):
            stream.read_header(BytesSource(bytes.fromhex(layout)))


def test_footer() -> None:
    stream.read_footer(BytesSource(bytes.fromhex("7e 00000005")), 5, "cpu")
    with pytest.raises(errors.IllegalRecord, match="Missing section footer for cpu: expected 0x7e, got 0x00"):
        stream.read_footer(BytesSource(bytes(5)), 5, "cpu")
    with pytest.raises(errors.IllegalRecord, match="Mismatched section id in footer for cpu") as caught:
        stream.read_footer(BytesSource(bytes.fromhex("7e 00000006")), 5, "cpu")
    assert (caught.value.expected, caught.value.got, caught.value.offset) == (5, 6, 1)
    with pytest.raises(errors.RecordTruncated):
        stream.read_footer(BytesSource(b"\x7e\x00"), 5, "cpu")


def test_vmdescription_may_be_missing() -> None:
    assert stream.read_vmdescription(BytesSource(b"")) is None
    record = stream.VmDescription(b"{}")
    assert stream.read_vmdescription(BytesSource(record.encode())) == record
    with pytest.raises(errors.IllegalRecord, match="Record after EOF"):
        stream.read_vmdescription(BytesSource(b"\0"))


def test_section_table() -> None:
    table = stream.SectionTable({("ram", 0): (4, 4), ("cpu", 0): (12, 12), ("timer", 0): (2, 3)})
    ram = stream.SectionStart(2, "ram", 0, 4)
    table.introduce(ram)
    table.introduce(stream.SectionFull(3, "timer", 0, 2))
    assert table.find(stream.SectionPart(2)) is ram
    assert table.find(stream.SectionEnd(2)) is ram
    with pytest.raises(errors.IllegalRecord, match="Unknown savevm section"):
        table.find(stream.SectionPart(3), 99)
    with pytest.raises(errors.IllegalRecord, match="a new one"):
        table.introduce(stream.SectionFull(2, "cpu", 0, 12))
    with pytest.raises(errors.StreamMismatch, match="Unknown savevm section or instance 'apic' 0"):
        table.introduce(stream.SectionFull(9, "apic", 0, 3))
    with pytest.raises(errors.StreamMismatch, match="expected 12 to 12, got 13"):
        table.introduce(stream.SectionFull(9, "cpu", 0, 13))
