"""The vocabulary of a QMP server, loaded from JSON Schema documents, and fast argument checkers made from it.

A document is a JSON Schema (2020-12) file with the types in `$defs` and two members of our own:

    "commands": {NAME: {"arguments": SCHEMA, "returns": SCHEMA, "oob": true, "unstable": true, ...}}
    "events":   {NAME: {"data": SCHEMA, "unstable": true, ...}}

A SCHEMA here is one of: a `$ref` (`#/$defs/T` or `file.json#/$defs/T`), `type` object | array | string |
integer | number | boolean | null, an `enum` of strings, or `anyOf` two scalar types (QEMU's alternate). An
integer's `format` is int64 (default), uint8, uint16, uint32 or uint64; an enum may list `aliases` accepted on
input. `since`, `unit` and `unstable` annotate; `ours` are the values of an enum that QEMU does not have. The
whole of JSON Schema is used in tests only; the checkers made here stop at the first error and say it in QEMU
7.2's words: members in the schema's order, then unknown ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from qmp.errors import GenericError

__all__ = ["Checker", "CommandSchema", "EventSchema", "Node", "Schema", "SchemaError"]

Node = dict[str, Any]
Checker = Callable[[Any, str, "str | None"], None]
"""(value, path of the parent, member name or None for an array's element); raises GenericError."""
Hider = Callable[[Any], Any]
"""A value without its unstable members."""

_INTEGER_RANGES = {
    "int64": (-(2**63), 2**63 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
_NO_MEMBERS: Node = {"type": "object", "properties": {}, "additionalProperties": False}


class SchemaError(Exception):
    """A schema document is wrong: a bug of this program, found when it starts or by its tests."""


@dataclass(frozen=True)
class Located:
    """A schema node and the document it stands in, against which its references are resolved."""

    schema: Schema
    document: str
    node: Node

    def resolve(self) -> Located:
        """The node itself, references followed."""
        located = self
        while "$ref" in located.node:
            located = located.schema.follow(located)
        return located

    def child(self, node: Node) -> Located:
        """A node inside this one."""
        return Located(self.schema, self.document, node)


@dataclass(frozen=True)
class CommandSchema:
    """What the schema says of one command."""

    name: str
    node: Node
    arguments: Located
    returns: Located

    @property
    def oob(self) -> bool:
        """Whether `exec-oob` is allowed."""
        return bool(self.node.get("oob", False))

    @cached_property
    def _checker(self) -> Checker:
        return compile_checker(self.arguments)

    @cached_property
    def hide_unstable(self) -> Hider | None:
        """What takes the unstable members out of a result, or None if there are none."""
        return _compile_hider(self.returns, ())

    def check_arguments(self, arguments: dict[str, Any]) -> None:
        """Check the arguments of a request.

        Raises:
            GenericError: they do not fit the schema, in QEMU's words.
        """
        self._checker(arguments, "", None)


@dataclass(frozen=True)
class EventSchema:
    """What the schema says of one event."""

    name: str
    node: Node
    data: Located

    @property
    def unstable(self) -> bool:
        """Whether `-compat unstable-output=hide` hides it."""
        return bool(self.node.get("unstable", False))

    @cached_property
    def hide_unstable(self) -> Hider | None:
        """What takes the unstable members out of the data, or None if there are none."""
        return _compile_hider(self.data, ())


class Schema:
    """All commands, events and types of the documents."""

    def __init__(self, documents: Mapping[str, bytes]) -> None:
        """`documents`: file name -> JSON text.

        Raises:
            SchemaError: a document is not JSON, or two define the same command or event.
        """
        self.documents: dict[str, Node] = {}
        self.commands: dict[str, CommandSchema] = {}
        self.events: dict[str, EventSchema] = {}
        for name, text in documents.items():
            try:
                document = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise SchemaError(f"{name}: {error}") from error
            self.documents[name] = document
            for command, node in document.get("commands", {}).items():
                arguments = Located(self, name, node.get("arguments", _NO_MEMBERS))
                returns = Located(self, name, node.get("returns", _NO_MEMBERS))
                self._add(self.commands, command, CommandSchema(command, node, arguments, returns))
            for event, node in document.get("events", {}).items():
                data = Located(self, name, node.get("data", _NO_MEMBERS))
                self._add(self.events, event, EventSchema(event, node, data))

    @staticmethod
    def _add(table: dict[str, Any], name: str, entry: Any) -> None:
        if name in table:
            raise SchemaError(f"{name} is defined twice")
        table[name] = entry

    def follow(self, located: Located) -> Located:
        """The node that a `$ref` node refers to."""
        reference = located.node["$ref"]
        file, _, pointer = reference.partition("#")
        document = file or located.document
        node: Any = self.documents.get(document)
        for step in pointer.strip("/").split("/"):
            node = node.get(step) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise SchemaError(f"{located.document}: nothing at {json.dumps(reference)}")
        return Located(self, document, node)

    def type_named(self, name: str) -> Located:
        """The definition of a type, wherever it stands.

        Raises:
            KeyError: no document defines it.
        """
        for document, content in self.documents.items():
            if name in content.get("$defs", {}):
                return Located(self, document, content["$defs"][name])
        raise KeyError(name)


def _full(path: str, name: str | None) -> str:
    if name is None:
        return path
    return f"{path}.{name}" if path else name


def _wrong_type(path: str, name: str | None, expected: str) -> GenericError:
    return GenericError(f"Invalid parameter type for '{_full(path, name)}', expected: {expected}")


def compile_checker(located: Located) -> Checker:
    """A function that checks a value against a schema node as QEMU's input visitor does."""
    located = located.resolve()
    node = located.node
    if "anyOf" in node:
        return _alternate_checker(located)
    if "enum" in node:
        return _enum_checker(node)
    kind = node.get("type")
    if kind == "object":
        return _object_checker(located)
    if kind == "array":
        return _array_checker(compile_checker(located.child(node["items"])))
    if kind == "integer":
        return _integer_checker(node.get("format", "int64"))
    if kind in _SCALARS:
        return _scalar_checker(kind)
    raise SchemaError(f"{located.document}: cannot check {json.dumps(node)[:80]}")


_SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "number": (int, float),
    "null": (type(None),),
}


def _scalar_checker(kind: str) -> Checker:
    types = _SCALARS[kind]

    def check(value: Any, path: str, name: str | None) -> None:
        if type(value) not in types:
            raise _wrong_type(path, name, kind)

    return check


def _integer_checker(format_: str) -> Checker:
    low, high = _INTEGER_RANGES[format_]

    def check_signed(value: Any, path: str, name: str | None) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _wrong_type(path, name, "integer")

    # Like QEMU, a negative number passes as a uint64: the handler knows the real range and says it.
    accepted = -(2**63) if format_ == "uint64" else low

    def check_unsigned(value: Any, path: str, name: str | None) -> None:
        if type(value) is not int or not -(2**63) <= value < 2**64:
            raise GenericError(f"Parameter '{_full(path, name)}' expects uint64")
        if not accepted <= value <= high:
            raise GenericError(f"Parameter '{name or 'null'}' expects {format_}_t")

    return check_signed if format_ == "int64" else check_unsigned


def _enum_checker(node: Node) -> Checker:
    values = frozenset(node["enum"]) | frozenset(node.get("aliases", {}))

    def check(value: Any, path: str, name: str | None) -> None:
        if type(value) is not str:
            raise _wrong_type(path, name, "string")
        if value not in values:
            raise GenericError(f"Parameter '{name or 'null'}' does not accept value '{value}'")

    return check


def _array_checker(check_item: Checker) -> Checker:
    def check(value: Any, path: str, name: str | None) -> None:
        if type(value) is not list:
            raise _wrong_type(path, name, "array")
        full = _full(path, name)
        for index, item in enumerate(value):
            check_item(item, f"{full}[{index}]", None)

    return check


def _object_checker(located: Located) -> Checker:
    node = located.node
    properties = node.get("properties", {})
    checkers = [(key, compile_checker(located.child(child))) for key, child in properties.items()]
    required = frozenset(node.get("required", ()))

    def check(value: Any, path: str, name: str | None) -> None:
        if type(value) is not dict:
            raise _wrong_type(path, name, "object")
        known = 0
        full = _full(path, name)
        for key, check_member in checkers:
            if key in value:
                known += 1
                check_member(value[key], full, key)
            elif key in required:
                raise GenericError(f"Parameter '{_full(full, key)}' is missing")
        if known != len(value):
            unknown = next(key for key in value if key not in properties)
            raise GenericError(f"Parameter '{_full(full, unknown)}' is unexpected")

    return check


def _alternate_checker(located: Located) -> Checker:
    types: set[type] = set()
    for branch in located.node["anyOf"]:
        kind = located.child(branch).resolve().node["type"]
        types.update((int,) if kind == "integer" else _SCALARS[kind])
    title = located.node["title"]

    def check(value: Any, path: str, name: str | None) -> None:
        if type(value) not in types:
            raise _wrong_type(path, name, title)

    return check


def _compile_array_hider(items: Located, above: tuple[int, ...]) -> Hider | None:
    """Elements that tell of a value which is `ours` alone go, the others lose their unstable members."""
    items = items.resolve()
    ours = {
        (key, value)
        for key, child in items.node.get("properties", {}).items()
        for value in items.child(child).resolve().node.get("ours", ())
    }
    hide_item = _compile_hider(items, above)
    if not ours:
        return hide_item and (lambda value: [hide_item(item) for item in value])

    def hide(value: Any) -> Any:
        kept = [item for item in value if not any(item.get(key) == alone for key, alone in ours)]
        return [hide_item(item) for item in kept] if hide_item else kept

    return hide


def _compile_hider(located: Located, above: tuple[int, ...]) -> Hider | None:
    located = located.resolve()
    node = located.node
    if id(node) in above:
        return None
    above = (*above, id(node))
    if node.get("type") == "array":
        return _compile_array_hider(located.child(node["items"]), above)
    if node.get("type") != "object":
        return None
    hidden = {key for key, child in node.get("properties", {}).items() if child.get("unstable")}
    inner = {
        key: hider
        for key, child in node.get("properties", {}).items()
        if key not in hidden and (hider := _compile_hider(located.child(child), above))
    }
    if not hidden and not inner:
        return None
    return lambda value: {
        key: inner[key](member) if key in inner else member
        for key, member in value.items()
        if key not in hidden
    }
