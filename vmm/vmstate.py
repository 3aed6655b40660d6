"""Device and CPU state as versioned tables of named fields: QEMU's VMState idea, on QEMU's wire layout.

A `Description` is written once per device. From it come the bytes of a section's body (`encode`), the
values back from a peer's bytes (`decode`), and the object that the stream's vmdescription carries
(`describe`), so the three cannot disagree.

    body        = field* subsection*
    field       = big-endian number | number[count] | buffer bytes | zero bytes (unused) | nested body
    subsection  = 05, length u8, name ("parent/child"), version be32, body

A subsection belongs to the description whose name it begins with; one that begins otherwise is left
where it is, for an outer description (QEMU `vmstate_subsection_load`).

Rules: this file knows no device and no stream; `decode` raises VMStateError or StreamTruncated and
nothing else, whatever the bytes are; values are checked against their type's range before they are encoded.

Sources: QEMU `docs/devel/migration.rst` ("VMState"), `migration/vmstate.c`, `migration/vmstate-types.c`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from vmm.errors import StreamTruncated, VMStateError
from vmm.vmstate_packed import NUMBERS, Packed, steps

__all__ = [
    "ByteSource",
    "BytesSource",
    "Codec",
    "Description",
    "Field",
    "Section",
    "Subsection",
    "Values",
    "blank",
    "decode",
    "describe",
    "encode",
    "prepare",
]

Values = dict[str, Any]
"""Field name -> int, bool, bytes, list or nested Values; subsection name -> its Values."""

SUBSECTION_MARK = 0x05

_OTHERS = ("buffer", "unused", "struct", "tmp")


class Codec(Protocol):
    """The layout of a field that no table can describe."""

    def encode(self, value: Any, /) -> bytes: ...

    def decode(self, source: ByteSource, /) -> Any:
        """Raises VMStateError or StreamTruncated."""


@dataclass(frozen=True)
class Field:
    """One named field.

    `count` is the length of an array (then the value is a list), or the bytes of a "buffer" or "unused".
    `since` is the first version of the description that has the field. A "tmp" is a nested table whose
    fields lie in the values of its parent (QEMU's VMSTATE_WITH_TMP); on the wire it is a "struct". A field
    with a `codec` has a layout of its own, and any type name (QEMU's VMStateInfo).
    """

    name: str
    type: str
    count: int | None = None
    struct: Description | None = None
    since: int = 0
    codec: Codec | None = None

    def __post_init__(self) -> None:
        if self.codec is not None:
            return
        if self.type not in NUMBERS and self.type not in _OTHERS:
            raise AssertionError(f"field {self.name}: no type {self.type}")
        if (self.struct is not None) != (self.type in ("struct", "tmp")):
            raise AssertionError(f"field {self.name}: a struct needs a description, nothing else has one")
        if self.count is None and self.type in ("buffer", "unused"):
            raise AssertionError(f"field {self.name}: a {self.type} needs its length")


@dataclass(frozen=True)
class Subsection:
    """A table that travels only when `needed(values of the parent)` says so."""

    description: Description
    needed: Callable[[Values], bool]


@dataclass(frozen=True)
class Description:
    """The state of one device, at one version, on the wire."""

    name: str
    version: int
    minimum_version: int
    fields: tuple[Field, ...]
    subsections: tuple[Subsection, ...] = ()
    _steps: dict[int, tuple[Field | Packed, ...]] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def steps(self, version: int) -> tuple[Field | Packed, ...]:
        """The fields of `version`, in order, with stretches of numbers packed; made at the first call."""
        if version not in self._steps:
            self._steps[version] = steps(self, version)
        return self._steps[version]


class ByteSource(Protocol):
    """Where bytes come from: a peer's stream or a buffer."""

    @property
    def offset(self) -> int:
        """How many bytes were consumed so far."""

    def read(self, n: int, /) -> bytes:
        """Exactly n bytes; StreamTruncated when they end earlier."""

    def peek(self, n: int, /) -> bytes:
        """Up to n bytes without consuming them; fewer only where the bytes end."""


class BytesSource:
    """A ByteSource over bytes in memory."""

    def __init__(self, data: bytes, offset: int = 0) -> None:
        self._data = data
        self._offset = offset

    @property
    def offset(self) -> int:
        return self._offset

    def read(self, n: int, /) -> bytes:
        taken = self._data[self._offset : self._offset + n]
        if len(taken) != n:
            raise StreamTruncated(n, len(taken), offset=self._offset)
        self._offset += n
        return taken

    def peek(self, n: int, /) -> bytes:
        return self._data[self._offset : self._offset + n]


class Section(Protocol):
    """What the migration stack asks of a thing with state."""

    @property
    def idstr(self) -> str: ...
    @property
    def instance_id(self) -> int: ...
    @property
    def description(self) -> Description: ...

    def save(self) -> Values:
        """The state as it is now; only with the vCPU stopped."""

    def load(self, values: Values, version: int) -> None:
        """Take the state over; VMStateError if it is inconsistent."""


# ---------------------------------------------------------------------------------------------- encode


def encode(description: Description, values: Values) -> bytes:
    """The body of a section, at the description's own version.

    Raises VMStateError when a value is missing, of the wrong kind, or out of its type's range.
    """
    out: list[bytes] = []
    _encode(description, values, description.name, out)
    return b"".join(out)


def _encode(description: Description, values: Values, where: str, out: list[bytes]) -> None:
    for step in description.steps(description.version):
        if isinstance(step, Field):
            _encode_field(step, values, f"{where}.{step.name}", out)
        elif (packed := step.pack(values)) is not None:
            out.append(packed)
        else:
            for each in step.fields:
                _encode_field(each, values, f"{where}.{each.name}", out)
    for sub, sub_values in _needed(description, values, where):
        name = sub.name.encode("ascii")
        out.append(struct.pack(">BB", SUBSECTION_MARK, len(name)) + name + struct.pack(">I", sub.version))
        _encode(sub, sub_values, sub.name, out)


def _encode_field(field: Field, values: Values, where: str, out: list[bytes]) -> None:
    if field.type == "unused":
        out.append(bytes(field.count or 0))
        return
    if field.type == "tmp":
        assert field.struct is not None
        _encode(field.struct, values, where, out)
        return
    try:
        value = values[field.name]
    except KeyError:
        raise VMStateError("Missing value", where, expected=field.type) from None
    if field.codec is not None:
        out.append(field.codec.encode(value))
        return
    if field.type == "buffer":
        if not isinstance(value, bytes) or len(value) != field.count:
            got = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            raise VMStateError("Bad value", where, expected=f"{field.count} bytes", got=got)
        out.append(value)
        return
    if field.count is None:
        _encode_element(field, value, where, out)
        return
    if not isinstance(value, list) or len(value) != field.count:
        got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise VMStateError("Bad value", where, expected=f"a list of {field.count}", got=got)
    for index, element in enumerate(value):
        _encode_element(field, element, f"{where}[{index}]", out)


def _encode_element(field: Field, value: Any, where: str, out: list[bytes]) -> None:
    if field.struct is not None:
        if not isinstance(value, dict):
            raise VMStateError("Bad value", where, expected="a table", got=type(value).__name__)
        _encode(field.struct, value, where, out)
        return
    if not isinstance(value, int):
        raise VMStateError("Bad value", where, expected=field.type, got=type(value).__name__)
    try:
        out.append(struct.pack(NUMBERS[field.type][0], value))
    except struct.error:
        raise VMStateError("Bad value", where, expected=field.type, got=value) from None


# ---------------------------------------------------------------------------------------------- decode


def decode(description: Description, source: ByteSource, version: int) -> Values:
    """Read a body that a peer saved at `version`.

    Fields newer than `version` are absent from the result, as are subsections that did not travel.
    Raises VMStateError for a version, subsection or bool we do not know, StreamTruncated when the bytes end.
    """
    return _decode(description, source, version, description.name)


def _decode(description: Description, source: ByteSource, version: int, where: str) -> Values:
    if not description.minimum_version <= version <= description.version:
        raise VMStateError(
            "Unsupported version",
            where,
            offset=source.offset,
            expected=f"{description.minimum_version} to {description.version}",
            got=version,
        )
    values: Values = {}
    for step in description.steps(version):
        if isinstance(step, Field):
            _decode_field(step, source, values, f"{where}.{step.name}")
        elif len(source.peek(step.size)) == step.size:
            step.unpack(source.read(step.size), values)
        else:
            for each in step.fields:
                _decode_field(each, source, values, f"{where}.{each.name}")
    _decode_subsections(description, source, values)
    return values


def _decode_field(field: Field, source: ByteSource, values: Values, where: str) -> None:
    if field.type == "unused":
        source.read(field.count or 0)
    elif field.type == "tmp":
        assert field.struct is not None
        values.update(_decode(field.struct, source, field.struct.version, where))
    elif field.codec is not None:
        values[field.name] = field.codec.decode(source)
    elif field.type == "buffer":
        values[field.name] = source.read(field.count or 0)
    elif field.count is None:
        values[field.name] = _decode_element(field, source, where)
    else:
        values[field.name] = [_decode_element(field, source, f"{where}[{i}]") for i in range(field.count)]


def _decode_element(field: Field, source: ByteSource, where: str) -> Any:
    if field.struct is not None:
        return _decode(field.struct, source, field.struct.version, where)
    code, size = NUMBERS[field.type]
    offset = source.offset
    raw = source.read(size)
    if field.type == "bool" and raw > b"\x01":
        raise VMStateError("Bad value", where, offset=offset, expected="0 or 1", got=raw[0])
    return struct.unpack(code, raw)[0]


def _decode_subsections(description: Description, source: ByteSource, values: Values) -> None:
    known = {sub.description.name: sub.description for sub in description.subsections}
    prefix = description.name.encode("ascii") + b"/"
    while True:
        head = source.peek(2)
        if len(head) < 2 or head[0] != SUBSECTION_MARK:
            return
        name = source.peek(2 + head[1])[2:]
        text = name.decode("ascii", "replace")
        if not name.startswith(prefix) and text not in known:  # QEMU has an "apic_sipi" below "apic"
            return  # an outer description's, or not a subsection at all: not ours to judge
        sub = known.get(text)
        if sub is None or text in values:
            what = "Unknown subsection" if sub is None else "Repeated subsection"
            raise VMStateError(
                what, description.name, offset=source.offset, expected=sorted(known) or "none", got=text
            )
        source.read(2 + head[1])
        (version,) = struct.unpack(">I", source.read(4))
        values[text] = _decode(sub, source, version, text)


def prepare(description: Description) -> None:
    """Do what `encode` and `decode` do only once: afterwards they take no longer than they must."""
    description.steps(description.version)
    if not _has_codec(description):  # what a codec takes is its own affair: there is no blank value for it
        with contextlib.suppress(VMStateError, StreamTruncated):
            values = blank(description)
            decode(description, BytesSource(encode(description, values)), description.version)
    for each in description.fields:
        if each.struct is not None:
            prepare(each.struct)
    for subsection in description.subsections:
        prepare(subsection.description)


def _has_codec(description: Description) -> bool:
    return any(
        each.codec is not None or (each.struct is not None and _has_codec(each.struct))
        for each in description.fields
    )


# ------------------------------------------------------------------------------- the JSON description


def describe(description: Description, values: Values) -> dict[str, Any]:
    """The object QEMU's vmdescription has for this device, without its "name" and "instance_id"."""
    out: dict[str, Any] = {
        "vmsd_name": description.name,
        "version": description.version,
        "fields": [_describe_field(field, values) for field in _fields(description, description.version)],
    }
    subsections = [describe(sub, sub_values) for sub, sub_values in _needed(description, values, "")]
    if subsections:
        out["subsections"] = subsections
    return out


def _describe_field(field: Field, values: Values) -> dict[str, Any]:
    if field.type == "unused":
        return {"name": "unused", "type": "unused_buffer", "size": field.count}
    if field.type == "buffer":
        return {"name": field.name, "type": "buffer", "size": field.count}
    if field.type == "tmp":
        assert field.struct is not None
        size = len(encode(field.struct, values))
        return {"name": field.name, "type": "tmp", **describe(field.struct, values), "size": size}
    out: dict[str, Any] = {"name": field.name}
    if field.codec is not None:
        return {**out, "type": field.type, "size": len(field.codec.encode(values[field.name]))}
    element = values[field.name]
    if field.count is not None:
        out["array_len"] = field.count
        element = element[0]  # QEMU, too, describes the first element for all of them
    out["type"] = field.type
    if field.struct is not None:
        out["struct"] = describe(field.struct, element)
        out["size"] = len(encode(field.struct, element))
    else:
        out["size"] = NUMBERS[field.type][1]
    return out


# --------------------------------------------------------------------------------------------- helpers


def blank(description: Description) -> Values:
    """All fields zero (a timer: not pending), no subsection: a start for tests and for reset states."""
    values: Values = {}
    for field in description.fields:
        if field.type == "tmp":
            assert field.struct is not None
            values.update(blank(field.struct))
        elif field.type == "buffer":
            values[field.name] = bytes(field.count or 0)
        elif field.type != "unused":
            elements = [_blank_element(field) for _ in range(1 if field.count is None else field.count)]
            values[field.name] = elements[0] if field.count is None else elements
    return values


def _blank_element(field: Field) -> Any:
    if field.struct is not None:
        return blank(field.struct)
    return {"timer": -1, "bool": False}.get(field.type, 0)


def _fields(description: Description, version: int) -> Iterator[Field]:
    return (field for field in description.fields if field.since <= version)


def _needed(description: Description, values: Values, where: str) -> Iterator[tuple[Description, Values]]:
    for subsection in description.subsections:
        if not subsection.needed(values):
            continue
        sub = subsection.description
        sub_values = values.get(sub.name)
        if sub_values is None:
            raise VMStateError("Missing subsection", where or description.name, expected=sub.name)
        yield sub, sub_values
