"""Stretches of plain numbers in a description as one `struct` format: a guest stands still meanwhile.

    field field[16] struct[8] buffer | codec | bool | field field ...
    ------------- Packed ----------- | Field | Field| --- Packed ---

A Packed gives exactly the bytes and values that going field by field does, or None where anything is not as
it should be: then going field by field finds the error, and its place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmm.vmstate import Description, Field, Values

__all__ = ["NUMBERS", "Packed", "steps"]

NUMBERS: Mapping[str, tuple[str, int]] = {
    "bool": (">?", 1),
    "uint8": (">B", 1),
    "uint16": (">H", 2),
    "uint32": (">I", 4),
    "uint64": (">Q", 8),
    "int8": (">b", 1),
    "int16": (">h", 2),
    "int32": (">i", 4),
    "int64": (">q", 8),
    "timer": (">q", 8),
}
"""Type -> struct code, size in bytes. "timer" is an expiry in ns of the virtual clock, -1: not pending."""


@dataclass(frozen=True)
class _Slot:
    """One field of the stretch: a number, or a table of numbers with `names`, or a list of `count` such."""

    name: str
    count: int | None
    names: tuple[str, ...] | None
    code: str

    def put(self, values: Values, out: list[Any]) -> bool:
        """Append the numbers; False if there are not so many."""
        value = values[self.name]
        if self.count is None:
            out += [value] if self.names is None else [value[name] for name in self.names]
            return True
        if type(value) is not list or len(value) != self.count:
            return False
        out += value if self.names is None else [each[name] for each in value for name in self.names]
        return True

    def take(self, numbers: tuple[Any, ...], at: int, values: Values) -> int:
        """Take the field's value from `numbers[at:]`; where the next one begins."""
        if self.names is None:
            if self.count is None:
                values[self.name] = numbers[at]
                return at + 1
            values[self.name] = list(numbers[at : at + self.count])
            return at + self.count
        width = len(self.names)
        count = 1 if self.count is None else self.count
        end = at + width * count
        tables = [dict(zip(self.names, numbers[i : i + width], strict=True)) for i in range(at, end, width)]
        values[self.name] = tables[0] if self.count is None else tables
        return end


class Packed:
    """Several fields at once."""

    def __init__(self, fields: Iterable[Field], slots: Iterable[_Slot]) -> None:
        self.fields = tuple(fields)
        self._slots = tuple(slots)
        self._struct = struct.Struct(">" + "".join(slot.code for slot in self._slots))
        self.size = self._struct.size

    def pack(self, values: Values) -> bytes | None:
        """Their bytes; None if a value is missing, of the wrong kind, or out of its type's range."""
        numbers: list[Any] = []
        try:
            if not all(slot.put(values, numbers) for slot in self._slots):
                return None
            return self._struct.pack(*numbers)
        except (KeyError, TypeError, struct.error):
            return None

    def unpack(self, raw: bytes, values: Values) -> None:
        """Set them in `values` from `size` bytes."""
        numbers, at = self._struct.unpack(raw), 0
        for slot in self._slots:
            at = slot.take(numbers, at, values)


def _code(field: Field) -> str | None:
    """Of one number that every pattern of bits is a value of; None for anything else."""
    return NUMBERS[field.type][0][1:] if field.type in NUMBERS and field.type != "bool" else None


def _slot(field: Field) -> _Slot | None:
    if field.codec is not None:
        return None
    count = 1 if field.count is None else field.count
    if field.struct is None:
        code = _code(field)
        return None if code is None else _Slot(field.name, field.count, None, f"{count}{code}")
    inner = field.struct
    codes = [_code(each) if each.codec is None and each.count is None else None for each in inner.fields]
    if field.type == "tmp" or inner.subsections or None in codes:
        return None
    if any(each.since > inner.version for each in inner.fields):
        return None
    names = tuple(each.name for each in inner.fields)
    return _Slot(field.name, field.count, names, "".join(code or "" for code in codes) * count)


def steps(description: Description, version: int) -> tuple[Field | Packed, ...]:
    """The fields of `version`, in order, stretches of two and more packed."""
    found: list[Field | Packed] = []
    fields: list[Field] = []
    slots: list[_Slot] = []

    def end() -> None:
        found.extend([Packed(fields, slots)] if len(slots) > 1 else fields)
        fields.clear()
        slots.clear()

    for field in description.fields:
        if field.since > version:
            continue
        slot = _slot(field)
        if slot is None:
            end()
            found.append(field)
        else:
            fields.append(field)
            slots.append(slot)
    end()
    return tuple(found)
