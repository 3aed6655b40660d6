"""Return path messages: both directions, cut short, corrupted; page requests checked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.byte_sources import ByteByByte
from vmm.migration import errors, wire
from vmm.migration import return_path as rp
from vmm.migration.peer import Fate
from vmm.vmstate import BytesSource

PAGES = {"ram": 70, "pc.bios": 16, "é": 1}
U32 = st.integers(0, 2**32 - 1)
BLOCKS = st.sampled_from(list(PAGES))
MESSAGES = st.one_of(
    st.builds(rp.Shut, U32),
    st.builds(rp.Pong, U32),
    st.builds(rp.ReqPages, BLOCKS, st.integers(0, 2**64 - 1), U32),
    BLOCKS.flatmap(
        lambda name: st.builds(
            rp.RecvBitmapReply,
            st.just(name),
            st.integers(0, 2 ** PAGES[name] - 1).map(
                lambda bits: bits.to_bytes(rp.bitmap_size_bytes(PAGES[name]), "little")
            ),
        )
    ),
    st.builds(rp.ResumeAck),
    st.builds(rp.SwitchoverAck),
    st.builds(rp.Loaded),
    st.builds(rp.Started),
    st.builds(rp.FateReply, st.sampled_from(Fate)),
)

EXAMPLES: list[tuple[rp.Message, str]] = [
    (rp.Shut(0), "0001 0004 00000000"),
    (rp.Pong(2), "0002 0004 00000002"),
    (rp.ReqPages("ram", 0x3000, 0x1000), "0003 0010 0000000000003000 00001000 03 72616d"),
    (
        rp.RecvBitmapReply("ram", b"\x01" + bytes(15)),
        "0005 0004 03 72616d 0000000000000010 01" + "00" * 15 + "0123456789abcdef",
    ),
    (rp.ResumeAck(), "0006 0004 00000001"),
    (rp.SwitchoverAck(), "0007 0000"),
    (rp.Loaded(), "5001 0000"),
    (rp.Started(), "5002 0000"),
    (rp.FateReply(Fate.COMPLETE), "5003 0004 00000003"),
]


@pytest.mark.parametrize(("message", "layout"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_each_message_has_the_bytes_of_the_format(message: rp.Message, layout: str) -> None:
    assert rp.MessageWriter().write(message) == bytes.fromhex(layout)
    assert rp.MessageReader(PAGES).read(BytesSource(bytes.fromhex(layout))) == message


def test_every_type_has_a_length() -> None:
    assert set(wire.RETURN_PATH_LENGTHS) == set(wire.ReturnPathType)


def test_the_block_is_named_once_per_channel() -> None:
    writer, reader = rp.MessageWriter(), rp.MessageReader(PAGES)
    first, second = rp.ReqPages("ram", 0, 4096), rp.ReqPages("ram", 4096, 4096)
    assert writer.write(first)[:2] == b"\0\x03"
    short = writer.write(second)
    assert short == bytes.fromhex("0004 000c 0000000000001000 00001000")
    with pytest.raises(errors.IllegalRecord, match="REQ_PAGES block: expected one REQ_PAGES_ID before"):
        reader.read(BytesSource(short))
    reader.read(BytesSource(rp.MessageWriter().write(first)))
    assert reader.read(BytesSource(short)) == second
    writer.reset()
    reader.reset()
    assert writer.write(second)[:2] == b"\0\x03"
    with pytest.raises(errors.IllegalRecord):
        reader.read(BytesSource(short))


@given(st.lists(MESSAGES, max_size=6))
def test_messages_round_trip_whole_and_byte_by_byte(messages: list[rp.Message]) -> None:
    writer = rp.MessageWriter()
    raw = b"".join(writer.write(message) for message in messages)
    for source in (BytesSource(raw), ByteByByte(raw)):
        reader = rp.MessageReader(PAGES)
        assert [reader.read(source) for _ in messages] == messages
        assert source.offset == len(raw)


@given(MESSAGES)
def test_a_message_cut_short_is_reported_at_every_byte(message: rp.Message) -> None:
    raw = rp.MessageWriter().write(message)
    for length in range(len(raw)):
        with pytest.raises(errors.RecordTruncated):
            rp.MessageReader(PAGES).read(BytesSource(raw[:length]))


@given(MESSAGES, st.data())
def test_corrupt_bytes_raise_only_stream_errors(message: rp.Message, data: st.DataObject) -> None:
    raw = bytearray(rp.MessageWriter().write(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = rp.MessageReader(PAGES).read(BytesSource(bytes(raw)))
    except errors.StreamError:
        return
    assert bytes(raw).startswith(rp.MessageWriter().write(got))


REFUSED = [
    ("0000 0000", errors.IllegalRecord, "type: expected 1 to 7, got 0 (at offset 0)"),
    ("0008 0000", errors.IllegalRecord, "type: expected 1 to 7, got 8"),
    ("0003 0201", errors.LimitExceeded, "REQ_PAGES_ID payload: expected 512 at most, got 513"),
    ("0001 0005", errors.IllegalRecord, "SHUT length: expected 4, got 5 (at offset 2)"),
    ("0003 000d", errors.IllegalRecord, "REQ_PAGES_ID length: expected at least 14"),
    ("0003 0010 0000000000003000 00001000 02 7261", errors.IllegalRecord, "REQ_PAGES_ID block length"),
    ("0005 0000", errors.IllegalRecord, "RECV_BITMAP length"),
    ("0005 0004 02 7261", errors.IllegalRecord, "RECV_BITMAP block length: expected 3, got 2"),
    ("0005 0002 01 78", errors.StreamMismatch, "RECV_BITMAP block: expected one of ram"),
    ("0005 0004 03 72616d 0000000000000008", errors.IllegalRecord, "'ram': expected 16, got 8"),
    ("0005 0004 03 72616d 1000000000000008", errors.LimitExceeded, "RECV_BITMAP size"),
    ("0005 0004 03 72616d 0000000000000010" + "00" * 24, errors.IllegalRecord, "RECV_BITMAP ending"),
    ("0006 0004 00000002", errors.IllegalRecord, "RESUME_ACK value: expected 0x1, got 0x2"),
]


@pytest.mark.parametrize(("layout", "error", "text"), REFUSED)
def test_a_bad_message_is_refused_with_what_and_where(
    layout: str, error: type[errors.StreamError], text: str
) -> None:
    with pytest.raises(error) as caught:
        rp.MessageReader(PAGES).read(BytesSource(bytes.fromhex(layout)))
    assert text in str(caught.value)


def test_a_bitmap_is_written_in_whole_words() -> None:
    with pytest.raises(errors.IllegalRecord, match="multiple of 8"):
        rp.MessageWriter().write(rp.RecvBitmapReply("ram", bytes(7)))
    assert [rp.bitmap_size_bytes(pages) for pages in (0, 1, 64, 65)] == [0, 8, 8, 16]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (rp.ReqPages("ram", 0, 4096), (0, 1)),
        (rp.ReqPages("ram", 69 * 4096, 4096), (69, 1)),
        (rp.ReqPages("ram", 0, 70 * 4096), (0, 70)),
        (rp.ReqPages("nope", 0, 4096), "no such RAMBlock"),
        (rp.ReqPages("ram", 1, 4096), "start is not page aligned"),
        (rp.ReqPages("ram", 0, 0), "not whole pages"),
        (rp.ReqPages("ram", 0, 100), "not whole pages"),
        (rp.ReqPages("ram", 70 * 4096, 4096), "70 pages"),
        (rp.ReqPages("ram", 69 * 4096, 8192), "70 pages"),
        (rp.ReqPages("ram", 2**64 - 4096, 4096), "70 pages"),
    ],
)
def test_page_requests_are_checked(request_: rp.ReqPages, expected: tuple[int, int] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(errors.BadPageRequest, match=expected) as caught:
            rp.check_request(request_, PAGES)
        assert (caught.value.block, caught.value.start) == (request_.block, request_.start)
    else:
        assert rp.check_request(request_, PAGES) == expected
