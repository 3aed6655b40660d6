"""Packed stretches of a description: the same bytes, values and errors as going field by field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import vmstate
from vmm.cpu.state import CPU_DESCRIPTION
from vmm.errors import StreamTruncated, VMStateError
from vmm.vmstate import BytesSource, Description, Field, Values, blank, decode, encode
from vmm.vmstate_packed import NUMBERS, Packed

PAIR = Description("pair", 1, 1, (Field("low", "uint64"), Field("high", "int16")))
DEVICE = Description(
    "device",
    2,
    1,
    (
        Field("a", "uint8"),
        Field("list", "uint32", 3),
        Field("pair", "struct", struct=PAIR),
        Field("flag", "bool"),
        Field("alone", "timer"),
        Field("gap", "unused", 5),
        Field("pairs", "struct", 2, PAIR),
        Field("late", "int64", since=2),
        Field("late_list", "int8", 2, since=2),
    ),
)


def by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is packed from now on."""

    def fields(description: Description, version: int) -> tuple[Field, ...]:
        return tuple(each for each in description.fields if each.since <= version)

    monkeypatch.setattr(Description, "steps", fields)


def of(field: Field) -> st.SearchStrategy[Any]:
    if field.struct is not None:
        one: st.SearchStrategy[Any] = tables(field.struct)
    elif field.type == "bool":
        one = st.booleans()
    else:
        code, size = NUMBERS[field.type]
        bits = 8 * size
        one = st.integers(0, (1 << bits) - 1)
        if code[1].islower():
            one = st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
    return one if field.count is None else st.lists(one, min_size=field.count, max_size=field.count)


def tables(description: Description) -> st.SearchStrategy[Values]:
    return st.fixed_dictionaries({f.name: of(f) for f in description.fields if f.type != "unused"})


def outcome(action: Any, *arguments: Any) -> object:
    """The result, or all that an error says."""
    try:
        return action(*arguments)
    except (VMStateError, StreamTruncated) as error:
        return type(error), str(error)


def test_the_stretches_are_as_long_as_they_can_be() -> None:
    steps = DEVICE.steps(2)
    assert [type(step) for step in steps] == [Packed, Field, Field, Field, Packed]
    assert [step.size for step in steps if isinstance(step, Packed)] == [1 + 12 + 10, 20 + 8 + 2]
    assert [type(step) for step in DEVICE.steps(1)][-1] is Field, "one alone is not worth it"


@given(tables(DEVICE), st.sampled_from([1, 2]), st.integers(0, 80))
def test_as_field_by_field(values: Values, version: int, length: int) -> None:
    packed = encode(DEVICE, values)
    cut = packed[:length]
    got = (
        outcome(decode, DEVICE, BytesSource(packed), version),
        outcome(decode, DEVICE, BytesSource(cut), version),
    )
    with pytest.MonkeyPatch.context() as patch:
        by_field(patch)
        assert encode(DEVICE, values) == packed
        assert decode(DEVICE, BytesSource(packed), version) == got[0]
        assert outcome(decode, DEVICE, BytesSource(cut), version) == got[1]


WRONG: list[tuple[str, object]] = [
    ("a", 256),
    ("a", -1),
    ("a", 1.0),
    ("a", "1"),
    ("list", [1, 2]),
    ("list", (1, 2, 3)),
    ("list", 1),
    ("pair", {"low": 1}),
    ("pair", {"low": 1, "high": 1 << 15}),
    ("pair", [1, 2]),
    ("pairs", [{"low": 1, "high": 2}]),
    ("pairs", [{"low": 1, "high": 2}, None]),
    ("late", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_found_where_it_is(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = blank(DEVICE) | {name: value}
    said = outcome(encode, DEVICE, values)
    assert isinstance(said, tuple)
    assert name in said[1]
    by_field(monkeypatch)
    assert outcome(encode, DEVICE, values) == said


def test_a_missing_value_is_named() -> None:
    values = blank(DEVICE)
    del values["list"]
    with pytest.raises(VMStateError, match=r"device\.list"):
        encode(DEVICE, values)


@given(st.data())
def test_the_cpu_is_one_stretch(data: st.DataObject) -> None:
    (step,) = CPU_DESCRIPTION.steps(12)
    assert isinstance(step, Packed)
    raw = data.draw(st.binary(min_size=step.size, max_size=step.size))
    values = decode(CPU_DESCRIPTION, BytesSource(raw), 12)
    assert encode(CPU_DESCRIPTION, values) == raw
    with pytest.MonkeyPatch.context() as patch:
        by_field(patch)
        assert vmstate.decode(CPU_DESCRIPTION, BytesSource(raw), 12) == values


class Words:
    """A codec whose values are no numbers."""

    def encode(self, value: Any) -> bytes:
        data: bytes = value["words"]
        return data

    def decode(self, source: vmstate.ByteSource) -> Any:
        return {"words": source.read(2)}


def test_what_has_a_codec_is_prepared_without_a_value() -> None:
    inner = Description("inner", 1, 1, (Field("payload", "words", codec=Words()),))
    vmstate.prepare(inner)
    vmstate.prepare(Description("outer", 1, 1, (Field("inner", "struct", struct=inner),)))
    values = {"payload": {"words": b"ab"}}
    assert decode(inner, BytesSource(encode(inner, values)), 1) == values
