"""Writes the files of `vmm/client/`, the typed client, that say what the schema documents say.

    python -m tools.client_generator            # write them
    python -m tools.client_generator --check    # exit status 1 if they are not what the schema says

An object of the schema becomes a dataclass with `from_wire`, and with `to_wire` if a command takes it; an
enum becomes a Literal; a command becomes a method; an event becomes a dataclass derived from `Event`.
"""

from __future__ import annotations

import difflib
import keyword
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import schema
from qmp.schema import CommandSchema, EventSchema, Located, Schema

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "vmm" / "client"
WIDTH = 110

BUILTINS = {"format"}
"""Arguments whose names would hide what Python has."""

SCALARS = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}

HEADS = {
    "types.py": '''\
"""The types of the schema: an enum is a Literal, an object a dataclass. Made by tools/client_generator.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from vmm.client.base import NOT_GIVEN, Wire, given
''',
    "events.py": '''\
"""The events of the schema. Made by tools/client_generator.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from vmm.client.base import Event, Wire, stamp
@TYPES@
''',
    "commands.py": '''\
"""The commands of the schema, each a method. Made by tools/client_generator.py."""

from __future__ import annotations

from collections.abc import Sequence

from qmp.client import QmpClient
from vmm.client.base import NOT_GIVEN, NotGiven, given
@TYPES@

__all__ = ["Commands"]


class Commands:
    """What a client can ask for. The base of `Client`."""

    def __init__(self, qmp: QmpClient) -> None:
        self.qmp = qmp
''',
}
"""Each file's beginning; imports that a file does not use are taken out."""


def python_name(name: str) -> str:
    """A name on the wire as an identifier."""
    name = name.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) or name in BUILTINS else name


def class_name(event: str) -> str:
    """MIGRATION_PASS -> MigrationPassEvent."""
    return "".join(word.capitalize() for word in event.split("_")) + "Event"


def docstring(text: str, indent: str) -> str:
    """The lines of a docstring."""
    lines = textwrap.wrap(text, WIDTH - len(indent) - 6)
    first, rest = (lines or ["(not described)"])[0], lines[1:]
    if not rest:
        return f'{indent}"""{first}"""\n'
    return f'{indent}"""{first}\n' + "".join(f"{indent}{line}\n" for line in rest) + f'{indent}"""\n'


class Generator:
    """The files of one schema."""

    def __init__(self, documents: Schema) -> None:
        self._schema = documents
        self._taken: set[str] = set()  # types that a command takes
        for command in documents.commands.values():
            self._note_taken(command.arguments)

    def texts(self) -> dict[str, str]:
        """Each file's name and text, not formatted."""
        types = [(name, Located(self._schema, document, node)) for document, name, node in self._types()]
        names = [name for name, _ in types]
        imported = f"from vmm.client.types import {', '.join(names)}"
        heads = {name: head.replace("@TYPES@", imported) for name, head in HEADS.items()}
        events = self._schema.events.values()
        return {
            "types.py": "\n".join(
                [
                    heads["types.py"],
                    f"__all__ = {names}\n",
                    *(self._enum(name, node) for name, node in types if "properties" not in node.node),
                    *(self._object(name, node) for name, node in types if "properties" in node.node),
                ]
            ),
            "events.py": "\n".join(
                [
                    heads["events.py"],
                    f"__all__ = {['EVENTS', *(class_name(event.name) for event in events)]}\n",
                    *(self._event(event) for event in events),
                    self._table(events),
                ]
            ),
            "commands.py": heads["commands.py"] + "".join(map(self._command, self._schema.commands.values())),
        }

    def _types(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for document, content in self._schema.documents.items():
            for name, node in content.get("$defs", {}).items():
                yield document, name, node

    def _note_taken(self, located: Located) -> None:
        node = located.node
        if "$ref" in node:
            self._taken.add(node["$ref"].rpartition("/")[2])
        inner = located.resolve()
        children = [
            *inner.node.get("properties", {}).values(),
            *([inner.node["items"]] if "items" in inner.node else []),
        ]
        for child in children:
            self._note_taken(inner.child(child))

    # Section: types

    def annotation(self, located: Located) -> str:
        """The Python type of a node."""
        node = located.node
        if "$ref" in node:
            return str(node["$ref"].rpartition("/")[2])
        if "anyOf" in node:
            return " | ".join(self.annotation(located.child(branch)) for branch in node["anyOf"])
        if "enum" in node:
            return f"Literal[{', '.join(repr(value) for value in node['enum'])}]"
        if node.get("type") == "array":
            return f"list[{self.annotation(located.child(node['items']))}]"
        return SCALARS.get(node.get("type", ""), "Any")

    def _convert(self, located: Located, value: str, method: str) -> str:
        """An expression that makes `value` of a wire value or the other way round."""
        if not self._needs_conversion(located):
            return value
        if "$ref" in located.node:
            type_name = self.annotation(located)
            return f"{type_name}.from_wire({value})" if method == "from_wire" else f"{value}.to_wire()"
        item = located.child(located.node["items"])
        return f"[{self._convert(item, 'each', method)} for each in {value}]"

    def _needs_conversion(self, located: Located) -> bool:
        inner = located.resolve()
        if inner.node.get("type") == "array":
            return self._needs_conversion(inner.child(inner.node["items"]))
        return "$ref" in located.node and "properties" in inner.node

    def _enum(self, name: str, located: Located) -> str:
        return f"\n{name} = {self.annotation(located)}\n{docstring(located.node.get('description', ''), '')}"

    def _object(self, name: str, located: Located) -> str:
        lines = [f"\n@dataclass(frozen=True, slots=True, kw_only=True)\nclass {name}:\n"]
        lines.append(docstring(located.node.get("description", ""), "    ") + "\n")
        lines += self._fields(located)
        lines.append("\n    @classmethod\n    def from_wire(cls, value: Wire) -> Self:\n")
        lines.append('        """Of a server\'s object."""\n        return cls(\n')
        lines += self._from_wire(located, "            ", "value")
        lines.append("        )\n")
        if name in self._taken:
            lines.append('\n    def to_wire(self) -> Wire:\n        """For a server."""\n')
            lines.append(f"        return given({self._to_wire(located, 'self.')})\n")
        return "".join(lines)

    def _members(self, located: Located) -> Iterator[tuple[str, Located, bool]]:
        """(name, node, whether it must be there), those that must first."""
        inner = located.resolve()
        required = inner.node.get("required", ())
        members = [
            (name, inner.child(node), name in required)
            for name, node in inner.node.get("properties", {}).items()
        ]
        yield from sorted(members, key=lambda member: not member[2])

    def _fields(self, located: Located) -> Iterator[str]:
        for name, node, is_required in self._members(located):
            kind = self.annotation(node)
            yield f"    {python_name(name)}: {kind if is_required else f'{kind} | None = None'}\n"
            text = node.node.get("description") or ""
            unit = f" In {node.node['unit']}." if "unit" in node.node else ""
            if text:
                yield docstring(text + unit, "    ")

    def _from_wire(self, located: Located, indent: str, source: str) -> Iterator[str]:
        for name, node, is_required in self._members(located):
            if is_required:
                value = self._convert(node, f'{source}["{name}"]', "from_wire")
            elif self._needs_conversion(node):
                converted = self._convert(node, "got", "from_wire")
                value = f'None if (got := {source}.get("{name}")) is None else {converted}'
            else:
                value = f'{source}.get("{name}")'
            yield f"{indent}{python_name(name)}={value},\n"

    def _to_wire(self, located: Located, source: str) -> str:
        parts = []
        for name, node, is_required in self._members(located):
            assert "_" not in name, f"{name}: given() makes a dash of it"
            value = f"{source}{python_name(name)}"
            converted = self._convert(node, value, "to_wire")
            if not is_required and source == "self.":
                converted = f"NOT_GIVEN if {value} is None else {converted}"
            elif not is_required and converted != value:
                converted = f"{value} if isinstance({value}, NotGiven) else {converted}"
            parts.append(f"{python_name(name)}={converted}")
        return ", ".join(parts)

    # Section: events and commands

    def _event(self, event: EventSchema) -> str:
        lines = [
            f"\n@dataclass(frozen=True, slots=True, kw_only=True)\nclass {class_name(event.name)}(Event):\n"
        ]
        lines.append(docstring(event.node.get("description", ""), "    "))
        fields = list(self._fields(event.data))
        if fields:
            members = "".join(self._from_wire(event.data, "            ", 'message["data"]'))
            lines += ["\n", *fields, "\n    @classmethod\n    def from_wire(cls, message: Wire) -> Self:\n"]
            lines.append('        """Of a server\'s message."""\n')
            lines.append(f"        return cls(\n            **stamp(message),\n{members}        )\n")
        return "".join(lines)

    def _table(self, events: Iterable[EventSchema]) -> str:
        rows = "".join(f'    "{event.name}": {class_name(event.name)},\n' for event in events)
        return f'\nEVENTS: Final[dict[str, type[Event]]] = {{\n{rows}}}\n"""By the names on the wire."""\n'

    def _command(self, command: CommandSchema) -> str:
        members = list(self._members(command.arguments))
        parameters = [f"{python_name(name)}: {self.annotation(node)}" for name, node, must in members if must]
        optional = [
            f"{python_name(name)}: {self.annotation(node)} | NotGiven = NOT_GIVEN"
            for name, node, must in members
            if not must
        ]
        more = ""
        if command.oob:
            optional.append("oob: bool = False")
            more += ", oob=oob"
        if command.node.get("takes-fd"):
            optional.append("fds: Sequence[int] = ()")
            more += ", fds=fds"
        signature = ", ".join(["self", *parameters, *(["*", *optional] if optional else [])])
        arguments = self._to_wire(command.arguments, "")
        call = (
            f'await self.qmp.execute("{command.name}"'
            + (f", given({arguments})" if members else "")
            + f"{more})"
        )
        text = command.node.get("description", "")
        lines = [
            f"\n    async def {python_name(command.name)}({signature}) -> {self._return_type(command)}:\n"
        ]
        lines.append(docstring(text, "        "))
        if self._return_type(command) == "None":
            lines.append(f"        {call}\n")
        else:
            lines.append(f"        result = {call}\n" if self._needs_conversion(command.returns) else "")
            value = self._convert(command.returns, "result", "from_wire")
            plain = f"        result: {self._return_type(command)} = {call}\n"
            lines.append("" if self._needs_conversion(command.returns) else plain)
            lines.append(f"        return {value}\n")
        return "".join(lines)

    def _return_type(self, command: CommandSchema) -> str:
        node = command.returns.node
        return (
            "None"
            if node.get("type") == "object" and not node.get("properties")
            else self.annotation(command.returns)
        )


def generate() -> dict[str, str]:
    """Each file's name and text, formatted."""
    texts = Generator(Schema(schema.documents())).texts()
    return {name: formatted(text, FOLDER / name) for name, text in texts.items()}


def formatted(text: str, path: pathlib.Path) -> str:
    """As ruff would have it at `path`, without unused imports. Raises SystemExit if it is no Python."""
    command = [sys.executable, "-m", "ruff"]
    for step in (["check", "--select=I,F401,RUF022", "--fix", "--quiet"], ["format"]):
        done = subprocess.run(
            [*command, *step, "--stdin-filename", str(path), "-"],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"ruff {step[0]}: {done.stdout}{done.stderr}")
        text = done.stdout
    return text


def main(arguments: list[str]) -> int:
    """Command line."""
    changed = False
    for name, text in generate().items():
        path = FOLDER / name
        old = path.read_text() if path.exists() else ""
        changed = changed or old != text
        if arguments == ["--check"]:
            lines = difflib.unified_diff(
                old.splitlines(True), text.splitlines(True), f"{name} is", f"{name} should be"
            )
            sys.stdout.writelines(lines)
        else:
            path.write_text(text)
    return int(changed and arguments == ["--check"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
