"""The schema documents: valid JSON Schema, documented throughout, QEMU's names only where they are QEMU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from qmp.schema import Schema, compile_checker
from schema import documents
from vmm.migration.params import ALIASES, PARAMETERS, Capability
from vmm.migration.status import MigrationStatus
from vmm.run_state import RunState

SCHEMA = Schema(documents())


@pytest.mark.parametrize("name", sorted(SCHEMA.documents))
def test_document_is_json_schema(name: str) -> None:
    document = SCHEMA.documents[name]
    Draft202012Validator.check_schema(document)
    assert document["$id"] == name
    assert document["title"]
    for table in ("commands", "events"):
        for entry in document.get(table, {}).values():
            for part in ("arguments", "returns", "data"):
                Draft202012Validator.check_schema(entry.get(part, {}))


def entries() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in SCHEMA.documents.values():
        for table in ("$defs", "commands", "events"):
            yield from document.get(table, {}).items()


@pytest.mark.parametrize(("name", "entry"), list(entries()))
def test_everything_is_documented(name: str, entry: dict[str, Any]) -> None:
    assert entry["description"].endswith(".")
    assert entry["since"]
    assert entry.get("unstable") or not name.startswith("x-"), f"{name} is named as unstable"
    holders = [entry, entry.get("arguments", {}), entry.get("data", {})]
    for holder in holders:
        for member, node in holder.get("properties", {}).items():
            assert "description" in node or "$ref" in node or "items" in node, member
            if member.startswith("x-"):
                assert node.get("unstable"), f"{member} is named as unstable"


@pytest.mark.parametrize("name", sorted(SCHEMA.commands))
def test_arguments_and_results_can_be_checked(name: str) -> None:
    compile_checker(SCHEMA.commands[name].arguments)
    compile_checker(SCHEMA.commands[name].returns)


@pytest.mark.parametrize("name", sorted(SCHEMA.events))
def test_event_data_can_be_checked(name: str) -> None:
    compile_checker(SCHEMA.events[name].data)


def test_enumerations_are_those_of_the_program() -> None:
    def values(name: str) -> list[str]:
        return list(SCHEMA.type_named(name).node["enum"])

    assert values("MigrationCapability") == [each.value for each in Capability]
    assert set(values("MigrationStatus")) >= {each.value for each in MigrationStatus}
    assert set(values("RunState")) == {each.value for each in RunState}
    aliases = SCHEMA.type_named("MigrationCapability").node["aliases"]
    assert aliases == {alias: target.value for alias, target in ALIASES.items()}


def test_parameters_have_the_defaults_of_the_program() -> None:
    members = SCHEMA.type_named("MigrationParameters").node["properties"]
    defaults = {name: node["default"] for name, node in members.items() if "default" in node}
    assert defaults == {name: parameter.default for name, parameter in PARAMETERS.items()}
    for name, parameter in PARAMETERS.items():
        if parameter.kind in ("int", "size"):
            assert members[name]["format"] == f"uint{parameter.bits}"
