"""`query-qmp-schema`: complete, closed, and short enough for clients that read 64 KiB lines."""

from __future__ import annotations

import json

from qmp.introspect import introspect, introspection_text
from qmp.schema import Schema
from schema import documents
from tests.qmp.validation import Judge

SCHEMA = Schema(documents())
NAMES = list(SCHEMA.commands)


def test_it_is_what_it_says_it_is_and_short() -> None:
    text = introspection_text(SCHEMA, NAMES)
    assert len(text) < 65536 - 100
    Judge(SCHEMA).check_return("query-qmp-schema", json.loads(text))


def test_every_reference_leads_somewhere() -> None:
    entities = introspect(SCHEMA, NAMES)
    by_name = {entity["name"]: entity for entity in entities}
    assert len(by_name) == len(entities)
    for entity in entities:
        used = [entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity]
        used += [member["type"] for member in entity.get("members", ()) if "type" in member]
        assert all(name in by_name for name in used)
        for key in ("arg-type",):
            assert key not in entity or by_name[entity[key]]["meta-type"] == "object"


def test_what_clients_look_for() -> None:
    by_name = {entity["name"]: entity for entity in introspect(SCHEMA, NAMES)}
    assert by_name["migrate-pause"]["allow-oob"] is True
    assert "allow-oob" not in by_name["migrate"]
    assert by_name["POSTCOPY_STATE"]["features"] == ["unstable"]
    arguments = by_name[by_name["migrate-set-parameters"]["arg-type"]]
    members = {member["name"]: member for member in arguments["members"]}
    assert members["x-checkpoint-delay"] == {
        "name": "x-checkpoint-delay",
        "type": "int",
        "default": None,
        "features": ["unstable"],
    }
    tls = by_name[members["tls-creds"]["type"]]
    assert tls["meta-type"] == "alternate"
    assert [member["type"] for member in tls["members"]] == ["str", "null"]
    capabilities = by_name[by_name["query-migrate-capabilities"]["ret-type"]]
    element = by_name[capabilities["element-type"]]
    enum = by_name[element["members"][0]["type"]]
    assert (
        len([name for name in enum["values"] if name not in ("x-postcopy-spool", "x-page-checksums")]) == 21
    )
    assert {"name": "x-colo", "features": ["unstable"]} in enum["members"]
    assert by_name[by_name["query-status"]["arg-type"]]["members"] == []
