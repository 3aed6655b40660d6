"""Our vocabulary is a part of stock's: a client generated from QEMU 7.2's schema decodes what we send.

Each command and event of ours, unstable additions aside, is compared with stock's through the introspection
of both: the arguments in full, results and events as a subset with the same members required.
"""

from __future__ import annotations

from typing import Any

from qmp.introspect import introspect
from qmp.schema import Schema
from schema import documents
from tests.vmm.control.stock import Stock

FLATTENED = {
    # Unions in stock, flat objects with the same members here: only the common members are compared.
    "query-qmp-schema",
    "query-cpus-fast",
    "GUEST_PANICKED",
}

OURS = {"x-postcopy-spool", "x-page-checksums"}
"""Values of enums that QEMU does not have; `-compat unstable-output=hide` hides what has them."""

LATER = {"exit-on-error"}
"""Members that QEMU got after 7.2; their `since` says when."""


class Vocabulary:
    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self.entities = {entity["name"]: entity for entity in entities}

    def shape(self, name: str, depth: int = 0) -> Any:
        """A type without names: builtin name, list, set of enum values, or member -> (optional, shape)."""
        entity = self.entities[name]
        kind = entity["meta-type"]
        if kind == "array":
            return [self.shape(entity["element-type"], depth)]
        if kind == "enum":
            return frozenset(member["name"] for member in entity["members"]) - OURS
        if kind == "alternate":
            return {"alternate": (False, sorted(member["type"] for member in entity["members"]))}
        if kind == "object":
            members = {
                member["name"]: ("default" in member, self.shape(member["type"], depth + 1))
                for member in entity["members"]
                if depth < 6 and not self.is_added(member)
            }
            return {**members, "tag": (True, None)} if "variants" in entity else members
        return name

    @staticmethod
    def is_added(member: dict[str, Any]) -> bool:
        """Is it ours, marked as unstable, or a newer QEMU's?"""
        if member["name"] in LATER:
            return True
        return "unstable" in member.get("features", ()) and member["name"] != "x-checkpoint-delay"


def misfit(ours: Any, theirs: Any, path: str, *, whole: bool) -> list[str]:
    """What a client that knows `theirs` would stumble over; `whole`: ours has to have everything."""
    if isinstance(theirs, list):
        if not isinstance(ours, list):
            return [f"{path}: no array"]
        return misfit(ours[0], theirs[0], path + "[]", whole=whole)
    if isinstance(theirs, frozenset):
        fits = isinstance(ours, frozenset) and (ours == theirs if whole else ours <= theirs)
        return [] if fits else [f"{path}: {ours} and {theirs}"]
    if isinstance(theirs, dict):
        if "tag" in theirs or not isinstance(ours, dict):
            return [] if "tag" in theirs else [f"{path}: no object"]
        found = [f"{path}: {name} is not in stock" for name in ours if name not in theirs]
        for name, (optional, shape) in theirs.items():
            if name in ours:
                if ours[name][0] != optional:
                    found.append(f"{path}: {name} differs in being optional")
                found += misfit(ours[name][1], shape, f"{path}.{name}", whole=whole)
            elif whole or not optional:
                found.append(f"{path}: {name} is missing")
        return found
    return [] if ours == theirs else [f"{path}: {ours} and {theirs}"]


def test_every_command_and_event_is_stocks(stock: Stock) -> None:
    stock.say(b'{"execute":"qmp_capabilities"}')
    (reply,) = stock.say(b'{"execute":"query-qmp-schema"}')[:1]
    theirs = Vocabulary(reply["return"])
    schema = Schema(documents())
    ours = Vocabulary(introspect(schema, list(schema.commands)))
    found: list[str] = []
    for name, entity in ours.entities.items():
        if entity["meta-type"] not in ("command", "event") or "unstable" in entity.get("features", ()):
            continue
        other = theirs.entities.get(name)
        if other is None:
            found.append(f"{name} is not in stock")
            continue
        assert entity.get("allow-oob", False) == other.get("allow-oob", False), name
        if name in FLATTENED:
            continue
        whole = entity["meta-type"] == "command"
        found += misfit(ours.shape(entity["arg-type"]), theirs.shape(other["arg-type"]), name, whole=whole)
        if whole:
            result, expected = ours.shape(entity["ret-type"]), theirs.shape(other["ret-type"])
            found += misfit(result, expected, f"{name} ->", whole=False)
    assert found == []
