"""~ The vocabulary as one HTML page: every command, event and type of the schema documents, with links.

Only what is in the documents is shown: descriptions, types, units, defaults, since when, what is unstable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from qmp.json_text import dump_json
from qmp.schema import CommandSchema, Located, Schema

__all__ = ["reference_html"]


def reference_html(schema: Schema, commands: Iterable[str], *, hide_unstable: bool = False) -> str:
    """The page. `commands` are those that can be executed; others of the schema are marked.

    `hide_unstable`: what is unstable is left out of replies and events, and marked so.
    """
    return "\n".join(
        _page(schema, frozenset(commands), "unstable, hidden here" if hide_unstable else "unstable")
    )


def _page(schema: Schema, available: frozenset[str], unstable: str) -> Iterator[str]:
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>QMP reference</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="stylesheet" href="/docs.css"></head><body>'
    )
    yield "<nav><h1>QMP reference</h1>"
    for name, document in schema.documents.items():
        yield f"<h2>{escape(document.get('title', name))}</h2><ul>"
        for kind in ("commands", "events", "$defs"):
            for entry in document.get(kind, {}):
                yield f'<li class="{_KINDS[kind]}">{_link(kind, entry)}</li>'
        yield "</ul>"
    yield "</nav><main>"
    for name, document in schema.documents.items():
        yield f"<section><h2>{escape(document.get('title', name))}</h2>"
        yield f"<p>{escape(document.get('description', ''))} "
        yield f'<a class="source" href="/schema/{escape(name)}">{escape(name)}</a></p>'
        for command in document.get("commands", {}):
            yield from _command(schema.commands[command], command in available, unstable)
        for event in document.get("events", {}):
            found = schema.events[event]
            yield from _heading("events", event, found.node, "event", unstable)
            yield from _members("Data", found.data, unstable)
            yield "</article>"
        for type_name, node in document.get("$defs", {}).items():
            yield from _type(type_name, Located(schema, name, node), unstable)
        yield "</section>"
    yield "</main></body></html>\n"


_KINDS = {"commands": "command", "events": "event", "$defs": "type"}


def _link(kind: str, name: str) -> str:
    return f'<a href="#{_KINDS[kind]}-{escape(name)}">{escape(name)}</a>'


def _heading(
    kind: str, name: str, node: dict[str, Any], label: str, unstable: str = "unstable"
) -> Iterator[str]:
    notes = [label, *(f"since {node[key]}" for key in ("since",) if key in node), *_flags(node, unstable)]
    yield f'<article class="{_KINDS[kind]}" id="{_KINDS[kind]}-{escape(name)}"><h3>{escape(name)}</h3>'
    yield "<p class='notes'>" + " ".join(f"<span>{escape(note)}</span>" for note in notes) + "</p>"
    yield f"<p>{escape(node.get('description', ''))}</p>"


def _flags(node: dict[str, Any], unstable: str) -> list[str]:
    labels = {"unstable": unstable, "deprecated": "deprecated"}
    return [label for key, label in labels.items() if node.get(key) is True]


def _command(command: CommandSchema, is_available: bool, unstable: str) -> Iterator[str]:
    label = "command" if is_available else "command, not available here"
    yield from _heading("commands", command.name, command.node, f"{label}{', oob' * command.oob}")
    yield from _members("Arguments", command.arguments)
    returns = command.returns
    if "$ref" in returns.node or returns.node.get("type") != "object":
        yield f"<p>Returns {_type_text(returns)}.</p>"
    else:
        yield from _members("Returns", returns, unstable)
    yield "</article>"


def _type(name: str, located: Located, unstable: str) -> Iterator[str]:
    node = located.node
    label = "enum" if "enum" in node else "alternate" if "anyOf" in node else str(node.get("type", "type"))
    yield from _heading("$defs", name, node, label)
    if "enum" in node:
        marked = node.get("unstable", ())
        values = (f"<code>{escape(v)}</code>{' (unstable)' * (v in marked)}" for v in node["enum"])
        yield "<p>" + ", ".join(values) + "</p>"
    elif "anyOf" in node:
        yield "<p>" + " or ".join(_type_text(located.child(branch)) for branch in node["anyOf"]) + "</p>"
    else:
        yield from _members("Members", located, unstable)
    yield "</article>"


def _members(title: str, located: Located, unstable: str = "unstable") -> Iterator[str]:
    """A table of an object's members; nothing if it has none."""
    if "$ref" in located.node:
        yield f"<p>{title}: {_type_text(located)}.</p>"
        return
    properties = located.node.get("properties", {})
    if not properties:
        return
    required = located.node.get("required", ())
    yield f"<table><caption>{title}</caption>"
    for name, node in properties.items():
        child = located.child(node)
        optional = "" if name in required else " <i>optional</i>"
        yield (
            f"<tr><th><code>{escape(name)}</code>{optional}</th><td>{_type_text(child)}</td>"
            f"<td>{escape(node.get('description', child.resolve().node.get('description', '')))}"
            f"{_details(node, unstable)}</td></tr>"
        )
    yield "</table>"


def _details(node: dict[str, Any], unstable: str) -> str:
    details = [f"default {dump_json(node['default'])}"] if "default" in node else []
    details += [f"{key} {node[key]}" for key in ("unit", "since") if key in node]
    details += _flags(node, unstable)
    return f" <small>{escape(', '.join(details))}</small>" if details else ""


def _type_text(located: Located) -> str:
    """A type in a few words, named ones as links."""
    node = located.node
    if "$ref" in node:
        return _link("$defs", node["$ref"].rpartition("/")[2])
    if node.get("type") == "array":
        return f"list of {_type_text(located.child(node['items']))}"
    if "anyOf" in node:
        return " or ".join(_type_text(located.child(branch)) for branch in node["anyOf"])
    if "enum" in node:
        return " | ".join(f"<code>{escape(value)}</code>" for value in node["enum"])
    kind = str(node.get("type", "any"))
    if kind == "object" and not node.get("properties"):
        return "nothing"
    return escape(str(node.get("format", kind)))
