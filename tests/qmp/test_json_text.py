"""One JSON text: QEMU 7.2's dialect, its error texts, and ASCII output."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp.errors import JsonSyntaxError
from qmp.json_text import REFUSED, dump_json, parse_json, parse_plain

# Texts recorded from QEMU 7.2.22.
ERRORS = [
    (rb'{"id":"\q"}', "invalid escape sequence in string"),
    (rb'{"id":"\u12"}', '\\u12" is not a valid Unicode character'),
    (rb'{"id":"\u12zz"}', "\\u12zz is not a valid Unicode character"),
    (rb'{"id":"\ud83dx"}', "\\ud83d is not a valid Unicode character"),
    (rb'{"id":"\udc00"}', "\\udc00 is not a valid Unicode character"),
    (rb'{"id":"\ud83d\u0041"}', "\\ud83d is not a valid Unicode character"),
    (b'{"a" 1}', "missing : in object pair"),
    (b"{1:2}", "key is not a string in object"),
    (b"{[]:2}", "key is not a string in object"),
    (b'{"a":1 "b":2}', "expected separator in dict"),
    (b"[1 2]", "expected separator in list"),
    (b"[1,]", "expecting value"),
    (b'{"a":]', "expecting value"),
    (b'{"a":[}]', "expecting value"),
    (b"]", "expecting value"),
    (b"{,}", "expecting value"),
    (b'{"a":1,"a":2}', "duplicate key"),
    (b'{"execute":"query-name","id":{"a":1,"a":2}}', "duplicate key"),
    (b'{"a:":":","a:":1}', "duplicate key"),
    (b"hello", "invalid keyword 'hello'"),
    (b'{"id":tru}', "invalid keyword 'tru'"),
    (b'{"id":1.}', "stray '1.}'"),
    (b'{"id":-}', "stray '-}'"),
    (b'{"id":-x}', "stray '-x'"),
    (b'{"id":01}', "stray '01'"),
    (b'{"id":007}', "stray '00'"),
    (b'{"id":1e}', "stray '1e}'"),
    (b'{"id":1e+}', "stray '1e+}'"),
    (b'{"id":+1}', "stray '+'"),
    (b'{"id":.5}', "stray '.'"),
    (b'{"id":NaN}', "stray 'N'"),
    (b'{"id":"\xc3("}', "invalid UTF-8 sequence in string"),
    (b'{"id":"\xed\xa0\x80"}', "invalid UTF-8 sequence in string"),
]

VALUES: list[tuple[bytes, Any]] = [
    (b"{'a':'it\\'s'}", {"a": "it's"}),
    (b"'\"'", '"'),
    (rb"'\/\b\f\n\r\t\\\"'", '/\b\f\n\r\t\\"'),
    (rb'"\ud83d\ude00"', "\U0001f600"),
    (rb"'\ud83d\ude00\u0000'", "\U0001f600\0"),
    (b"'\xc5\xbc'", "ż"),
    (b"['a',-0,1.5e3,true,false,null,{}]", ["a", 0, 1500.0, True, False, None, {}]),
    (b"['',18446744073709551615,18446744073709551616]", ["", 2**64 - 1, float(2**64)]),
    (b"['',-9223372036854775808,-9223372036854775809]", ["", -(2**63), float(-(2**63))]),
    (b' {"a":{"b":[1,{"c":[]}]},"d":":"} ', {"a": {"b": [1, {"c": []}]}, "d": ":"}),
]


@pytest.mark.parametrize(("text", "what"), ERRORS)
def test_error_texts(text: bytes, what: str) -> None:
    with pytest.raises(JsonSyntaxError) as caught:
        parse_json(text)
    assert str(caught.value) == f"JSON parse error, {what}"


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values(text: bytes, value: Any) -> None:
    assert parse_json(text) == value


def test_number_out_of_range_is_an_error_since_inf_is_not_json() -> None:
    for text in (b'{"id":1e400}', b"-1e400", b"9" * 400):
        with pytest.raises(JsonSyntaxError, match="number out of range"):
            parse_json(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab:,\"'{é", max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_round_trip(value: Any) -> None:
    text = dump_json(value)
    assert text.isascii()
    assert "\n" not in text
    assert parse_json(text.encode()) == value
    assert json.loads(dump_json(value, pretty=True)) == value


@given(JSON)
def test_strict_parser_agrees_with_orjson(value: Any) -> None:
    text = dump_json([value]).encode()
    assert parse_plain(text) == [value]
    # A single-quoted string in front makes orjson refuse the text.
    assert parse_plain(b"['',[" + text + b"]]") is REFUSED
    assert parse_json(b"['',[" + text + b"]]") == ["", [[value]]]


@given(st.binary(max_size=40) | st.text("{}[]:,'\"\\ 01.eE-+tfn", max_size=40).map(str.encode))
def test_nothing_but_the_documented_error(data: bytes) -> None:
    with contextlib.suppress(JsonSyntaxError):
        parse_json(data)


def test_deep_values_are_read_and_written() -> None:
    deep = b"'" + b"'," + b"[" * 1020 + b'{"a": 1}' + b"]" * 1020
    value = parse_json(b"[" + deep + b"]")
    assert dump_json(value) == (b'["", ' + deep[3:] + b"]").decode()
