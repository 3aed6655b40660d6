"""Framing: any split gives the same messages, one error a bad message, no command is ever swallowed."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp.errors import JsonSyntaxError
from qmp.json_stream import MAX_STEPS, NOT_READY, JsonStream

OK = b'{"execute":"q","id":"ok"}'
OK_VALUE = {"execute": "q", "id": "ok"}


def read_all(chunks: Iterable[bytes], **limits: int) -> list[Any]:
    """Messages as values, errors as their texts."""
    stream = JsonStream(**limits)
    found: list[Any] = []
    for chunk in chunks:
        stream.feed(chunk)
        while (message := stream.next_message()) is not NOT_READY or stream.is_paused:
            if message is not NOT_READY:
                found.append(str(message) if isinstance(message, JsonSyntaxError) else message)
    return found


def each_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


E = "JSON parse error, "
# (input that a good command follows, what comes before that command's value)
CASES: list[tuple[bytes, list[Any]]] = [
    (b"", []),
    (b' \r\n\t{"a":1}{"b":2}\n[1,2] 5 \n"abc"', [{"a": 1}, {"b": 2}, [1, 2], 5, "abc"]),
    (b"null true -7 ", [None, True, -7]),
    (b'{"a":\n  "b"}\r\n\r\n', [{"a": "b"}]),
    (b'{"a":"x\\"{\'","b":\'"}\'}', [{"a": "x\"{'", "b": '"}'}]),
    (b'{"execute":"que\xff', [E + "stray '\"que\ufffd'"]),
    (b'{"execute":"a\x01b"}\n', [E + "stray '\"a\x01'"]),
    (b'{"a":"\\\x01"}', [E + "stray '\"\\\x01'"]),
    (b"\x00", [E + "stray ''"]),
    (b"\xff\xff\xff\xff", [E + "stray '\ufffd'"]),
    (b"/* x */", [E + "stray '/'"]),
    (b'"abc\n', [E + "stray '\"abc\n'"]),
    (b'{"execute":"q","id":NaN}', [E + "stray 'N'"]),
    (b'{"execute":"q","id":%d}', [E + "stray '%'"]),
    (b'{"execute":N\n', [E + "stray 'N'"]),
    (b'{"execute":%d,"arguments":{"a":[{}]}}', [E + "stray '%'"]),
    (b'{"x":N, "s":"}}{{", "y":[{},{}]}', [E + "stray 'N'"]),
    (b'{"x":N, "s":"}}{\n', [E + "stray 'N'"]),
    (b'{"x":N [ \'"\' \x02 ', [E + "stray 'N'"]),
    (b'{"id":007}', [E + "stray '00'"]),
    (b"[" * 2000 + b"]" * 2000, ["JSON nesting depth limit exceeded"]),
    (b"hello world\n", [E + "invalid keyword 'hello'"]),
    (b"}}", [E + "expecting value"]),
    (b",:", [E + "expecting value"]),
    (b'{"a":]}', [E + "expecting value"]),
    (b'{"a":[}}', [E + "expecting value"]),
]


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_messages(data: bytes, expected: list[Any]) -> None:
    assert read_all([data + OK]) == [*expected, OK_VALUE]
    assert read_all(each_byte(data + OK)) == [*expected, OK_VALUE]


def test_command_inside_a_bad_message_is_found() -> None:
    data = b'{"execute":"x" N {"execute":"y"} \n' + OK
    assert read_all([data]) == [E + "stray 'N'", {"execute": "y"}, OK_VALUE]


def test_number_at_the_end_of_input() -> None:
    stream = JsonStream()
    stream.feed(b"12")
    assert stream.next_message() is NOT_READY
    stream.feed_eof()
    assert stream.next_message() == 12
    assert stream.next_message() is NOT_READY


def test_depth_1024_is_the_limit() -> None:
    assert read_all([b"[" * 1024 + b"]" * 1024])[0] != "JSON nesting depth limit exceeded"
    assert read_all([b"[" * 1025 + b"]" * 1025]) == ["JSON nesting depth limit exceeded"]


@pytest.mark.parametrize("step", [1, 7, 100000])
def test_size_limit(step: int) -> None:
    data = b'{"a":"' + b"x" * 2000 + b'"}' + OK
    chunks = [data[i : i + step] for i in range(0, len(data), step)]
    assert read_all(chunks, max_message_bytes=1000) == ["JSON token size limit exceeded", OK_VALUE]


def test_one_call_takes_few_steps() -> None:
    """However dense the bytes are, and whatever is done with them."""
    for dense in (b'["' * 3000, b'{"a":[{"a":[' * 900, b"[1,{'" * 3000, b'{"id":[' * 2000):
        stream, calls = JsonStream(), 0
        stream.feed(dense)
        while stream.next_message() is not NOT_READY or stream.is_paused:
            calls += 1
        assert calls >= len(re.findall(rb"[\[{\"']++", dense)) // MAX_STEPS - 1
        stream.feed(b"\xff" + OK)
        assert read_rest(stream)[-1] == OK_VALUE


@pytest.mark.parametrize("pattern", [b"[", b"x", b'["', b'{"a":', b"]{[", b'{"id":', b"[{'id'"])
def test_a_bad_message_without_an_end_is_hopeless(pattern: bytes) -> None:
    stream, errors = JsonStream(max_message_bytes=50_000), 0
    stream.feed(b"%")
    fed = 0
    while not stream.is_hopeless:
        stream.feed(pattern * (5000 // len(pattern)))
        fed += 5000
        errors += len(read_rest(stream))
        assert fed <= 65_000
    assert fed >= 50_000
    assert errors <= 2


def read_rest(stream: JsonStream) -> list[Any]:
    """What can be read now."""
    found = []
    while (message := stream.next_message()) is not NOT_READY or stream.is_paused:
        if message is not NOT_READY:
            found.append(message)
    return found


def test_token_limit() -> None:
    data = b"[" + b"1," * 100 + b"1]" + OK
    assert read_all([data], max_marks=50) == ["JSON token count limit exceeded", OK_VALUE]
    assert read_all([b'["' + b"," * 200 + b'"]'], max_marks=50) == [["," * 200]]


PIECES = st.sampled_from(
    [OK, b'{"a":{"b":[]}}', b"\x00", b"\xff", b"\xc5\xbc", b'"x"', b'{"execute":', b"true"]
    + [bytes([byte]) for byte in b"{}[]\"'\\,:1-nN\n "]
)


@given(st.lists(PIECES, max_size=12).map(b"".join), st.randoms(use_true_random=False))
def test_any_split_gives_the_same(data: bytes, chance: random.Random) -> None:
    cuts = sorted(chance.choices(range(len(data) + 1), k=3))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    whole = read_all([data])
    assert read_all(pieces) == whole
    assert read_all(each_byte(data)) == whole


@given(st.binary(max_size=60))
def test_a_reset_byte_and_a_command_always_get_through(garbage: bytes) -> None:
    assert read_all([garbage + b"\xff" + OK])[-1] == OK_VALUE
    assert read_all([garbage, b"\xff", OK])[-1] == OK_VALUE


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3), max_size=5))
def test_valid_messages_come_out_as_they_went_in(messages: list[dict[str, str]]) -> None:
    data = b"".join(json.dumps(message).encode() for message in messages)
    assert read_all([data]) == messages
    assert read_all(each_byte(data)) == messages


def _time_s(data: bytes) -> float:
    started = time.process_time()
    read_all(data[i : i + 65536] for i in range(0, len(data), 65536))
    return time.process_time() - started


@pytest.mark.parametrize(
    "unit", [b'{"a":', b"[[[N", b'"', b"{}", b"\xff", b"{'a':1}", b'{"a":"' + b"x" * 50 + b"\\n"]
)
def test_time_is_linear(unit: bytes) -> None:
    # Eight times the input may take eight times as long; quadratic would be sixty-four times.
    short = _time_s(unit * (65536 // 2 // len(unit)))
    long = _time_s(unit * (65536 * 4 // len(unit)))
    assert long < 24 * short + 0.1


@pytest.mark.parametrize(
    ("data", "unread"),
    [(b'{"a":1}\r\n', False), (b'{"a":1}\r\n{', True), (b'{"a":1} 5', True), (b"{} \t", False), (b"", False)],
)
def test_what_is_unread(data: bytes, unread: bool) -> None:
    stream = JsonStream()
    stream.feed(data)
    if data:
        assert stream.next_message() is not NOT_READY
    assert stream.has_unread == unread
    while stream.next_message() is not NOT_READY:
        pass
    assert not stream.has_unread
