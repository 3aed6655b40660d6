"""vmstate: QEMU's bytes out and back, for described tables and for arbitrary ones."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import vmstate
from vmm.errors import StreamTruncated, VMStateError
from vmm.vmstate import BytesSource, Description, Field, Subsection, Values

SEGMENT = Description("segment", 1, 1, (Field("selector", "uint32"), Field("base", "uint64")))
EXTRA = Description("toy/extra", 2, 1, (Field("a", "int32"), Field("b", "uint8", since=2)))
TOY = Description(
    "toy",
    3,
    2,
    (
        Field("small", "uint8"),
        Field("pad", "unused", 3),
        Field("text", "buffer", 4),
        Field("segs", "struct", 2, SEGMENT),
        Field("late", "uint16", since=3),
        Field("flag", "bool"),
    ),
    (Subsection(EXTRA, lambda values: "toy/extra" in values),),
)
VALUES: Values = {
    "small": 7,
    "text": b"abcd",
    "segs": [{"selector": 1, "base": 2}, {"selector": 3, "base": 4}],
    "late": 0x1234,
    "flag": True,
}
BYTES = bytes.fromhex("07 000000 61626364 00000001 0000000000000002 00000003 0000000000000004 1234 01")
EXTRA_BYTES = b"\x05\x09toy/extra" + bytes.fromhex("00000002 ffffffff 09")


def decode(data: bytes, version: int = 3) -> Values:
    return vmstate.decode(TOY, BytesSource(data), version)


def test_layout_is_big_endian_and_packed() -> None:
    assert vmstate.encode(TOY, VALUES) == BYTES
    assert decode(BYTES) == VALUES


def test_subsection_follows_the_fields() -> None:
    values = {**VALUES, "toy/extra": {"a": -1, "b": 9}}
    assert vmstate.encode(TOY, values) == BYTES + EXTRA_BYTES
    assert decode(BYTES + EXTRA_BYTES) == values


def test_older_version_lacks_the_newer_field() -> None:
    values = decode(BYTES[:-3] + b"\x01", 2)
    assert "late" not in values
    assert values["flag"] is True


def test_foreign_subsection_is_left_alone() -> None:
    source = BytesSource(BYTES + b"\x05\x05other")
    vmstate.decode(TOY, source, 3)
    assert source.peek(2) == b"\x05\x05"


@pytest.mark.parametrize(
    ("data", "version", "text"),
    [
        (BYTES, 4, "Unsupported version in toy at offset 0, expected 2 to 3, got 4"),
        (BYTES, 1, "Unsupported version"),
        (BYTES[:-1] + b"\x02", 3, "Bad value in toy.flag at offset 34, expected 0 or 1, got 2"),
        (BYTES + b"\x05\x06toy/no\0\0\0\1", 3, "Unknown subsection in toy at offset 35"),
        (BYTES + EXTRA_BYTES + EXTRA_BYTES, 3, "Repeated subsection"),
        (BYTES + b"\x05\x09toy/extra\0\0\0\x07", 3, "Unsupported version in toy/extra"),
    ],
)
def test_bad_bytes_say_where(data: bytes, version: int, text: str) -> None:
    with pytest.raises(VMStateError) as caught:
        decode(data, version)
    assert text in str(caught.value)


@pytest.mark.parametrize("length", range(len(BYTES)))
def test_truncation_is_told(length: int) -> None:
    with pytest.raises(StreamTruncated):
        decode(BYTES[:length])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"small": 256}, "Bad value in toy.small, expected uint8, got 256"),
        ({"small": "x"}, "expected uint8, got str"),
        ({"text": b"abc"}, "expected 4 bytes, got 3 bytes"),
        ({"text": 3}, "expected 4 bytes, got int"),
        ({"segs": [{}]}, "expected a list of 2, got 1"),
        ({"segs": 5}, "expected a list of 2, got int"),
        ({"segs": [{"selector": 0, "base": -1}] * 2}, "toy.segs[0].base, expected uint64, got -1"),
        ({"segs": [1, 2]}, "expected a table, got int"),
    ],
)
def test_bad_values_are_refused(change: Values, text: str) -> None:
    with pytest.raises(VMStateError) as caught:
        vmstate.encode(TOY, {**VALUES, **change})
    assert text in str(caught.value)


def test_missing_values_are_refused() -> None:
    with pytest.raises(VMStateError, match=r"Missing value in toy\.small"):
        vmstate.encode(TOY, {})
    always = Description("p", 1, 1, (), (Subsection(EXTRA, lambda _: True),))
    with pytest.raises(VMStateError, match="Missing subsection in p, expected toy/extra"):
        vmstate.encode(always, {})


@pytest.mark.parametrize(
    ("type_", "count", "sub"), [("float", None, None), ("struct", None, None), ("buffer", None, None)]
)
def test_a_wrong_table_is_a_bug(type_: str, count: int | None, sub: Description | None) -> None:
    with pytest.raises(AssertionError):
        Field("x", type_, count, sub)


def test_description_has_qemus_shape() -> None:
    described = vmstate.describe(TOY, {**VALUES, "toy/extra": {"a": 1, "b": 2}})
    assert list(described) == ["vmsd_name", "version", "fields", "subsections"]
    assert described["fields"][1] == {"name": "unused", "type": "unused_buffer", "size": 3}
    assert described["fields"][2] == {"name": "text", "type": "buffer", "size": 4}
    segs = described["fields"][3]
    assert (segs["array_len"], segs["type"], segs["size"]) == (2, "struct", 12)
    assert segs["struct"]["vmsd_name"] == "segment"
    assert described["subsections"][0]["vmsd_name"] == "toy/extra"
    assert "subsections" not in vmstate.describe(TOY, VALUES)


def test_tmp_lies_in_its_parent() -> None:
    inner = Description("fpreg_tmp", 0, 0, (Field("tmp_mant", "uint64"), Field("tmp_exp", "uint16")))
    outer = Description("fpreg", 0, 0, (Field("tmp", "tmp", struct=inner),))
    values = {"tmp_mant": 1, "tmp_exp": 2}
    assert vmstate.blank(outer) == {"tmp_mant": 0, "tmp_exp": 0}
    assert vmstate.encode(outer, values) == bytes.fromhex("0000000000000001 0002")
    assert vmstate.decode(outer, BytesSource(vmstate.encode(outer, values)), 0) == values
    assert vmstate.describe(outer, values)["fields"][0]["size"] == 10


# ------------------------------------------------------------------------------------ arbitrary tables

RANGES = {
    "bool": st.booleans(),
    **{f"uint{n}": st.integers(0, 2**n - 1) for n in (8, 16, 32, 64)},
    **{f"int{n}": st.integers(-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
    "timer": st.integers(-1, 2**63 - 1),
}


@st.composite
def tables(draw: st.DrawFn, name: str = "t", depth: int = 2) -> tuple[Description, Values]:
    fields: list[Field] = []
    values: Values = {}
    for index in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from([*RANGES, "buffer", "unused", *(["struct"] if depth else [])]))
        field_name = f"f{index}"
        count: int | None = draw(st.none() | st.integers(1, 3))
        sub: Description | None = None
        value: Any
        if kind in ("buffer", "unused"):
            count = draw(st.integers(0, 9))
            value = draw(st.binary(min_size=count, max_size=count))
        elif kind == "struct":
            # No subsection inside an element: on the wire only the table's name tells whose one is.
            sub, value = draw(tables(f"{name}{index}", 0))
            value = value if count is None else [value] * count
        else:
            value = draw(
                RANGES[kind] if count is None else st.lists(RANGES[kind], min_size=count, max_size=count)
            )
        fields.append(Field(field_name, kind, count, sub))
        if kind != "unused":
            values[field_name] = value
    subsections: list[Subsection] = []
    if depth:
        for index in range(draw(st.integers(0, 2))):
            sub, sub_values = draw(tables(f"{name}/{index}", depth - 1))
            subsections.append(Subsection(sub, lambda v, key=sub.name: key in v))  # type: ignore[misc]  # a default argument is what binds the name
            if draw(st.booleans()):
                values[sub.name] = sub_values
    return Description(name, 1, 1, tuple(fields), tuple(subsections)), values


@given(tables())
def test_every_table_round_trips(table: tuple[Description, Values]) -> None:
    description, values = table
    data = vmstate.encode(description, values)
    source = BytesSource(data + b"\x7e\0\0\0\1")
    assert vmstate.decode(description, source, 1) == values
    assert source.offset == len(data)
    vmstate.describe(description, values)
    assert vmstate.encode(description, vmstate.blank(description)) is not None


@given(tables(), st.binary(max_size=200), st.integers(0, 3))
def test_no_bytes_raise_anything_else(table: tuple[Description, Values], data: bytes, version: int) -> None:
    with contextlib.suppress(VMStateError, StreamTruncated):
        vmstate.decode(table[0], BytesSource(data), version)


@given(st.binary(max_size=80))
def test_bytes_after_a_good_body_do_no_harm(data: bytes) -> None:
    with contextlib.suppress(VMStateError, StreamTruncated):
        vmstate.decode(TOY, BytesSource(BYTES + data), 3)
