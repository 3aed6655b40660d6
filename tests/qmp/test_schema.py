"""Argument checkers: QEMU's words, and the same verdict as `jsonschema` on the same document."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp.errors import GenericError
from qmp.schema import Schema, SchemaError
from schema import documents
from tests.qmp.validation import Judge

SCHEMA = Schema(documents())
JUDGE = Judge(SCHEMA)
CAPS, PARAMS = "migrate-set-capabilities", "migrate-set-parameters"
EVENTS = {"capability": "events", "state": True}
NODE = {"node-name": "a", "alias": "b", "bitmaps": [{"name": "x"}]}

# Recorded from QEMU 7.2.22.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (PARAMS, {"compress-level": 300}, "Parameter 'compress-level' expects uint8_t"),
    (PARAMS, {"compress-level": -1}, "Parameter 'compress-level' expects uint8_t"),
    (PARAMS, {"compress-level": 2.0}, "Parameter 'compress-level' expects uint64"),
    (PARAMS, {"compress-level": "2"}, "Parameter 'compress-level' expects uint64"),
    (PARAMS, {"compress-level": True}, "Parameter 'compress-level' expects uint64"),
    (PARAMS, {"tls-creds": 5}, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
    (PARAMS, {"tls-creds": []}, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
    (PARAMS, {"multifd-compression": "x"}, "Parameter 'multifd-compression' does not accept value 'x'"),
    (
        PARAMS,
        {"multifd-compression": 3},
        "Invalid parameter type for 'multifd-compression', expected: string",
    ),
    (PARAMS, {"max-bandwidth": 1.5}, "Parameter 'max-bandwidth' expects uint64"),
    (PARAMS, {"max-bandwidth": float(2**64)}, "Parameter 'max-bandwidth' expects uint64"),
    (
        PARAMS,
        {"cpu-throttle-tailslow": 1},
        "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean",
    ),
    (PARAMS, {"block-bitmap-mapping": [{}]}, "Parameter 'block-bitmap-mapping[0].node-name' is missing"),
    (
        PARAMS,
        {"block-bitmap-mapping": [NODE]},
        "Parameter 'block-bitmap-mapping[0].bitmaps[0].alias' is missing",
    ),
    (
        PARAMS,
        {"block-bitmap-mapping": 5},
        "Invalid parameter type for 'block-bitmap-mapping', expected: array",
    ),
    (PARAMS, {"foo": 1, "compress-level": "x"}, "Parameter 'compress-level' expects uint64"),
    (CAPS, {"capabilities": {}}, "Invalid parameter type for 'capabilities', expected: array"),
    (CAPS, {"capabilities": [1]}, "Invalid parameter type for 'capabilities[0]', expected: object"),
    (CAPS, {"capabilities": [{}]}, "Parameter 'capabilities[0].capability' is missing"),
    (CAPS, {"capabilities": [{"capability": "events"}]}, "Parameter 'capabilities[0].state' is missing"),
    (
        CAPS,
        {"capabilities": [{"capability": 5, "state": True}]},
        "Invalid parameter type for 'capabilities[0].capability', expected: string",
    ),
    (CAPS, {"capabilities": [EVENTS | {"zz": 0}]}, "Parameter 'capabilities[0].zz' is unexpected"),
    (
        CAPS,
        {"capabilities": [EVENTS, {"capability": "x"}]},
        "Parameter 'capability' does not accept value 'x'",
    ),
    (CAPS, {}, "Parameter 'capabilities' is missing"),
    (
        "human-monitor-command",
        {"command-line": "", "cpu-index": "x"},
        "Invalid parameter type for 'cpu-index', expected: integer",
    ),
    ("qmp_capabilities", {"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
    ("qmp_capabilities", {"enable": [5]}, "Invalid parameter type for 'enable[0]', expected: string"),
    ("qmp_capabilities", {"enable": ["x"]}, "Parameter 'null' does not accept value 'x'"),
    ("query-status", {"x": 1}, "Parameter 'x' is unexpected"),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (PARAMS, {"tls-creds": None, "tls-hostname": "", "x-postcopy-start-time": 2**32 - 1}),
    (PARAMS, {"max-bandwidth": 2**64 - 1}),
    (CAPS, {"capabilities": [EVENTS, {"capability": "x-postcopy-ram", "state": False}]}),
    ("migrate", {"uri": "tcp:h:1", "detach": True, "resume": False}),
    ("quit", {}),
]


@pytest.mark.parametrize(("name", "arguments", "text"), REFUSED)
def test_refused(name: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(GenericError) as caught:
        SCHEMA.commands[name].check_arguments(arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(("name", "arguments"), ACCEPTED)
def test_accepted(name: str, arguments: dict[str, Any]) -> None:
    SCHEMA.commands[name].check_arguments(arguments)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 2**64 - 1)
    | st.just(1.5)
    | st.sampled_from(["", "events", "zlib"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["capability", "state", "node-name", "x"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(SCHEMA.commands)))
    known = sorted(SCHEMA.commands[name].arguments.resolve().node.get("properties", {}))
    keys = st.sampled_from([*known, "x"])
    return name, draw(st.dictionaries(keys, VALUES, max_size=4))


@given(calls())
def test_same_verdict_as_jsonschema(call: tuple[str, dict[str, Any]]) -> None:
    name, arguments = call
    try:
        SCHEMA.commands[name].check_arguments(arguments)
        accepted = True
    except GenericError:
        accepted = False
    assert accepted == JUDGE.arguments_fit(name, arguments)


@pytest.mark.parametrize(
    "documents_",
    [
        {"a.json": b"{"},
        {"a.json": b'{"commands":{"x":{}}}', "b.json": b'{"commands":{"x":{}}}'},
    ],
)
def test_bad_documents(documents_: dict[str, bytes]) -> None:
    with pytest.raises(SchemaError):
        Schema(documents_)


@pytest.mark.parametrize("node", [b'{"$ref":"#/$defs/T"}', b'{"$ref":"b.json#/x"}', b'{"type":"odd"}'])
def test_bad_nodes_are_found_when_compiled(node: bytes) -> None:
    schema = Schema({"a.json": b'{"commands":{"x":{"arguments":%b}}}' % node})
    with pytest.raises(SchemaError):
        schema.commands["x"].check_arguments({})


def test_type_named() -> None:
    assert SCHEMA.type_named("RunState").document == "run-state.json"
    with pytest.raises(KeyError):
        SCHEMA.type_named("Nope")


def test_what_only_we_have_is_hidden_with_the_unstable() -> None:
    document = {
        "$defs": {"Name": {"type": "string", "enum": ["a", "x-b"], "ours": ["x-b"]}},
        "commands": {
            "list": {
                "returns": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"name": {"$ref": "#/$defs/Name"}}},
                }
            }
        },
    }
    hide = Schema({"test.json": json.dumps(document).encode()}).commands["list"].hide_unstable
    assert hide is not None
    assert hide([{"name": "a"}, {"name": "x-b"}]) == [{"name": "a"}]
