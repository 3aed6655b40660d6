"""Writes `docs/qmp-reference.md`, the reference of every command, event and type, from the schema documents.

python -m tools.schema_docs            # write it
python -m tools.schema_docs --check    # exit status 1 if it is not what the schema says
"""

from __future__ import annotations

import difflib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import schema
from qmp.schema import Located, Schema

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "qmp-reference.md"

HEAD = """\
# QMP reference

Made from `schema/` by `tools/schema_docs.py`. Commands, events and types are those of QEMU 7.2 unless they
are marked *unstable*; the wire protocol is QEMU's. The same as Python, with types: `vmm/client/`.
"""


def pages(documents: Schema) -> Iterator[str]:
    """The lines of the reference."""
    yield HEAD
    for document in documents.documents.values():
        yield f"- [{document['title']}](#{anchor(document['title'])}): {document['description']}"
    for name, document in documents.documents.items():
        yield f"\n## {document['title']}\n\n{document['description']} Source: `schema/{name}`."
        for command in document.get("commands", {}):
            found = documents.commands[command]
            notes = ["may be executed out of band"] if found.oob else []
            notes += ["takes a file descriptor passed with SCM_RIGHTS"] if found.node.get("takes-fd") else []
            yield from entry("Command", command, found.node, notes)
            yield from members("Arguments", found.arguments)
            if found.returns.node.get("type") != "object" or "$ref" in found.returns.node:
                yield f"\nReturns {type_text(found.returns)}."
            else:
                yield from members("Returns", found.returns)
        for event in document.get("events", {}):
            yield from entry("Event", event, documents.events[event].node)
            yield from members("Data", documents.events[event].data)
        for type_name, node in document.get("$defs", {}).items():
            yield from entry("Type", type_name, node)
            located = Located(documents, name, node)
            if "enum" in node:
                yield "\nOne of " + ", ".join(enum_value(value, node) for value in node["enum"]) + "."
            elif "anyOf" in node:
                yield f"\nEither {type_text(located)}."
            else:
                yield from members("Members", located)


def anchor(title: str) -> str:
    """The anchor that forges give a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def entry(kind: str, name: str, node: dict[str, Any], notes: list[str] | None = None) -> Iterator[str]:
    """The heading and the text of a command, event or type."""
    yield f"\n### {name}\n"
    remarks = [f"since {node['since']}"] if "since" in node else []
    remarks += [f"*{key}*" for key in ("unstable", "deprecated") if node.get(key) is True] + (notes or [])
    yield f"{kind}{', ' if remarks else ''}{', '.join(remarks)}. {node.get('description', '')}"


def members(title: str, located: Located) -> Iterator[str]:
    """A list of an object's members; nothing if it has none."""
    if "$ref" in located.node:
        yield f"\n{title}: {type_text(located)}."
        return
    required = located.node.get("required", ())
    properties = located.node.get("properties", {})
    if properties:
        yield f"\n{title}:\n"
    for name, node in properties.items():
        child = located.child(node)
        details = [type_text(child), *([] if name in required else ["optional"])]
        details += [f"default {json.dumps(node['default'])}"] if "default" in node else []
        details += [f"from {node['minimum']}"] if "minimum" in node else []
        details += [f"to {node['maximum']}"] if "maximum" in node else []
        details += [f"in {node['unit']}"] if "unit" in node else []
        details += [f"since {node['since']}"] if "since" in node else []
        details += ["*unstable*"] if node.get("unstable") is True else []
        text = node.get("description", child.resolve().node.get("description", ""))
        yield f"- `{name}` ({', '.join(details)}): {text}"


def enum_value(value: str, node: dict[str, Any]) -> str:
    """A value of an enum."""
    return f"`{value}`{' (*unstable*)' if value in node.get('unstable', ()) else ''}"


def type_text(located: Located) -> str:
    """A type in a few words, a named one as link."""
    node = located.node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    if node.get("type") == "array":
        return f"list of {type_text(located.child(node['items']))}"
    if "anyOf" in node:
        return " or ".join(type_text(located.child(branch)) for branch in node["anyOf"])
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    return str(node.get("format", node.get("type", "any")))


def main(arguments: list[str]) -> int:
    """Command line."""
    text = "\n".join(pages(Schema(schema.documents()))) + "\n"
    if arguments == ["--check"]:
        old = TARGET.read_text() if TARGET.exists() else ""
        sys.stdout.writelines(
            difflib.unified_diff(old.splitlines(True), text.splitlines(True), "is", "should be")
        )
        return int(old != text)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
