"""Judges replies and events by the schema documents, with `jsonschema`, which the program does without."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from qmp.schema import Schema


class Judge:
    """Knows the schema's verdict on everything a server sends."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._registry: Any = Registry().with_resources(
            [(name, Resource.from_contents(document)) for name, document in schema.documents.items()]
        )

    def _validator(self, document: str, *path: str) -> Any:
        pointer = "/".join(path)
        return Draft202012Validator({"$ref": f"{document}#/{pointer}"}, registry=self._registry)

    def arguments_fit(self, command: str, arguments: dict[str, Any]) -> bool:
        """Whether the arguments are what the schema says."""
        entry = self._schema.commands[command]
        if "arguments" not in entry.node:
            return not arguments
        document = entry.arguments.document
        return bool(
            self._validator(document, "commands", command, "arguments").is_valid(arguments)  # the $ref inside
        )

    def check_return(self, command: str, value: Any) -> None:
        """Fail if the result of a command is not what the schema says."""
        entry = self._schema.commands[command]
        if "returns" not in entry.node:
            assert value == {}, f"{command} returned {value}"
            return
        self._validator(entry.returns.document, "commands", command, "returns").validate(value)

    def check_event(self, event: dict[str, Any]) -> None:
        """Fail if an event is unknown, or not what the schema says."""
        assert list(event) in (["timestamp", "event"], ["timestamp", "event", "data"])
        assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
        entry = self._schema.events[event["event"]]
        if "data" not in entry.node:
            assert "data" not in event
            return
        self._validator(entry.data.document, "events", event["event"], "data").validate(event["data"])
