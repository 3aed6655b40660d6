"""The reference has everything that the documents have, well-formed, with links that lead somewhere."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import schema
from qmp.http.reference import reference_html
from qmp.schema import Schema

VOID = {"meta", "link", "br"}


class Reader(HTMLParser):
    """Collects ids, links and text, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [value] if (value := found.get("id")) else []
        self.links += [value] if tag == "a" and (value := found.get("href")) else []
        assert "style" not in found, "the content policy blocks it"
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_everything_is_there() -> None:
    vocabulary = Schema(schema.documents())
    reader = read(reference_html(vocabulary, vocabulary.commands))
    for name in vocabulary.commands:
        assert f"command-{name}" in reader.ids
    for name in vocabulary.events:
        assert f"event-{name}" in reader.ids
    for document in vocabulary.documents.values():
        for name, node in document.get("$defs", {}).items():
            assert f"type-{name}" in reader.ids
            assert node.get("description", "") in reader.text
    assert len(reader.ids) == len(set(reader.ids))
    for link in reader.links:
        assert link[1:] in reader.ids if link.startswith("#") else link.startswith("/schema/"), link


def test_what_it_says_of_a_command() -> None:
    document = {
        "title": "A <b> title",
        "$defs": {"Kind": {"type": "string", "enum": ["a", "b"], "unstable": ["b"], "description": "Kinds."}},
        "commands": {
            "do-it": {
                "description": "Does it & more.",
                "since": "9.9",
                "oob": True,
                "arguments": {
                    "type": "object",
                    "properties": {
                        "kind": {"$ref": "#/$defs/Kind"},
                        "list": {"type": "array", "items": {"type": "integer", "format": "uint8"}},
                        "on": {"type": "boolean", "default": False, "unit": "ms", "description": "Whether."},
                    },
                    "required": ["kind"],
                },
                "returns": {"type": "array", "items": {"$ref": "#/$defs/Kind"}},
            },
            "not-here": {"description": "Has no handler.", "unstable": True},
        },
    }
    reader = read(reference_html(Schema({"x.json": json.dumps(document).encode()}), ["do-it"]))
    for text in (
        "A <b> title",
        "Does it & more.",
        "command, oob",
        "since 9.9",
        "list of uint8",
        "Whether. default false, unit ms",
        "Returns list of Kind.",
        "a, b (unstable)",
        "command, not available here",
        "Kinds.",
    ):
        assert text in reader.text, text


def test_what_is_hidden_is_marked() -> None:
    figure = {"type": "object", "properties": {"x": {"type": "integer", "unstable": True}}}
    document = {
        "commands": {"ask": {"arguments": figure, "returns": figure}},
        "events": {"TOLD": {"unstable": True, "data": {"type": "object"}}},
        "$defs": {"Figure": figure},
    }
    known = Schema({"x.json": json.dumps(document).encode()})
    assert "hidden" not in read(reference_html(known, ["ask"])).text
    text = read(reference_html(known, ["ask"], hide_unstable=True)).text
    assert text.count("unstable, hidden here") == 3  # not the argument
    assert text.count("unstable") == 4
