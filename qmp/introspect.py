"""`query-qmp-schema`: the schema in QEMU's own form, a flat list of entities, made once.

Types lose their names, as in QEMU (they are not part of the interface), and only what a command or event
refers to is listed. go-qemu reads lines of at most 64 KiB: the text must stay below that, by test.
"""

from __future__ import annotations

from typing import Any, Final

from qmp.json_text import dump_json
from qmp.schema import Located, Schema
from qmp.session import RawJson

__all__ = ["introspect", "introspection_text"]

_BUILTINS: Final = {
    "string": ("str", "string"),
    "integer": ("int", "int"),
    "number": ("number", "number"),
    "boolean": ("bool", "boolean"),
    "null": ("null", "null"),
}
"""JSON Schema type -> (QEMU's type, its json-type)."""


def introspection_text(schema: Schema, commands: list[str]) -> RawJson:
    """The reply of `query-qmp-schema`, encoded."""
    return RawJson(dump_json(introspect(schema, commands)))


def introspect(schema: Schema, commands: list[str]) -> list[dict[str, Any]]:
    """The SchemaInfo of the named commands, of all events, and of the types they use."""
    types = _Types()
    entities: list[dict[str, Any]] = []
    for name in commands:
        command = schema.commands[name]
        entity: dict[str, Any] = {
            "name": name,
            "meta-type": "command",
            "arg-type": types.name_of(command.arguments),
            "ret-type": types.name_of(command.returns),
        }
        if command.oob:
            entity["allow-oob"] = True
        entities.append(entity | _features(command.node))
    for event in schema.events.values():
        entity = {"name": event.name, "meta-type": "event", "arg-type": types.name_of(event.data)}
        entities.append(entity | _features(event.node))
    return entities + types.entities


def _features(node: dict[str, Any]) -> dict[str, Any]:
    features = [name for name in ("unstable", "deprecated") if node.get(name) is True]
    return {"features": features} if features else {}


class _Types:
    """The types met so far; a type is the same if it is the same object in the documents, or empty."""

    def __init__(self) -> None:
        self.entities: list[dict[str, Any]] = []
        self._names: dict[object, str] = {}

    def name_of(self, located: Located) -> str:
        located = located.resolve()
        node = located.node
        kind = node.get("type")
        if kind == "array":
            return self._array(located)
        if kind in _BUILTINS and "enum" not in node:
            return self._builtin(kind)
        key: object = "empty" if kind == "object" and not node.get("properties") else id(node)
        if key not in self._names:
            self._names[key] = str(len(self._names))
            entity: dict[str, Any] = {"name": self._names[key]}
            self.entities.append(entity)
            entity.update(self._describe(located))
        return self._names[key]

    def _builtin(self, kind: str) -> str:
        name, json_type = _BUILTINS[kind]
        if not any(entity["name"] == name for entity in self.entities):
            self.entities.append({"name": name, "meta-type": "builtin", "json-type": json_type})
        return name

    def _array(self, located: Located) -> str:
        element = self.name_of(located.child(located.node["items"]))
        name = f"[{element}]"
        if not any(entity["name"] == name for entity in self.entities):
            self.entities.append({"name": name, "meta-type": "array", "element-type": element})
        return name

    def _describe(self, located: Located) -> dict[str, Any]:
        node = located.node
        if "anyOf" in node:
            branches = [{"type": self.name_of(located.child(branch))} for branch in node["anyOf"]]
            return {"meta-type": "alternate", "members": branches}
        if "enum" in node:
            unstable = node.get("unstable", ())
            members = [
                {"name": value, "features": ["unstable"]} if value in unstable else {"name": value}
                for value in node["enum"]
            ]
            return {"meta-type": "enum", "members": members, "values": node["enum"]}
        required = node.get("required", ())
        members = []
        for name, child in node.get("properties", {}).items():
            member = {"name": name, "type": self.name_of(located.child(child))}
            if name not in required:
                member["default"] = None
            members.append(member | _features(child))
        return {"meta-type": "object", "members": members}
