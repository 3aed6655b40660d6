"""option_syntax: QEMU's keyval syntax, its numbers and sizes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import OptionError
from vmm.option_syntax import Key, parse_keys, parse_size, split_commas

KEYS = {
    "first": Key("text"),
    "b": Key("bool"),
    "n": Key("number"),
    "s": Key("size"),
    "c": Key("red|green"),
}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x", {"first": "x"}),
        ("first=x", {"first": "x"}),
        ("/a=b/c,b=on", {"first": "/a=b/c", "b": True}),
        ("a,,b,b", {"first": "a,b", "b": True}),
        ("x,nob,n=0x10", {"first": "x", "b": False, "n": 16}),
        ("x,n=010,s=1.5k", {"first": "x", "n": 8, "s": 1536}),
        ("x,s=0x100,c=red,c=green", {"first": "x", "s": 256, "c": "green"}),
        ('{"first": "x,y", "b": false, "n": 7}', {"first": "x,y", "b": False, "n": 7}),
        ("x,", {"first": "x"}),
    ],
)
def test_values(text: str, values: dict[str, object]) -> None:
    assert parse_keys(text, "first", KEYS) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,q=1", "Invalid parameter 'q'; accepted: b, c, first, n, s"),
        ("x,q", "Invalid parameter 'q'"),
        ("x,n", "Expected '=' after parameter 'n'"),
        ("x,b=maybe", "Parameter 'b' expects 'on' or 'off', got 'maybe'"),
        ("x,n=-1", "expects a non-negative number below 2^64, got '-1'"),
        ("x,n=1_0", "expects a non-negative number"),
        ("x,n=99999999999999999999", "expects a non-negative number"),
        ("x,s=1Q", "expects a size below 2^64"),
        ("x,s=16E", "expects a size below 2^64"),
        ("x,s=.5k", "expects a size below 2^64"),
        ("x,c=blue", "does not accept value 'blue'; accepted: green, red"),
        ("{x", "Invalid JSON"),
        ("{" * 100000, "Invalid JSON"),
        ('{"first": []}', "Parameter 'first' expects a string"),
        ('{"n": 1.5}', "Parameter 'n' expects a number"),
    ],
)
def test_errors_say_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_keys(text, "first", KEYS)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64 << 20), ("1G", 1 << 30), ("512k", 512 << 10), ("0x40", 64), ("8B", 8)]
)
def test_sizes_with_a_default_suffix(text: str, size: int) -> None:
    assert parse_size("size", text, "M") == size


# An item that begins with a comma cannot be told from one before it that ends with one; QEMU's cannot either.
@given(st.lists(st.text(alphabet="ab,=", min_size=1).map(lambda text: "x" + text), min_size=1))
def test_doubled_commas_keep_every_item(items: list[str]) -> None:
    assert split_commas(",".join(item.replace(",", ",,") for item in items)) == items


@given(st.text())
def test_any_text_gives_values_or_an_option_error(text: str) -> None:
    with contextlib.suppress(OptionError):
        parse_keys(text, "first", KEYS)
