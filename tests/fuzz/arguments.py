"""Invariant: any command with any arguments gets a reply that fits the schema, or an error that was foreseen.

no exception, no "Internal error"; what is refused has changed nothing; one reply each, with its id
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.framing import check_reply
from tests.fuzz.human import a_vm
from tests.vmm.control.fakes import FakeClient, FakeVm

NEED_A_LOOP = frozenset(("memsave", "pmemsave", "x-query-ram-digest"))
LIMITS = (0, 1, -1, 7, 4095, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**30)
TEXTS = ("", "a", "on", "none", "tcp:h:1", "fd:x", "exec:", "\u00e9\U0001f600\0", "x" * 5000, "/dev/fdset/0")

SEEDS = [number.to_bytes(4, "little") * 3 for number in range(64)]
TOKENS: list[bytes] = []


def check(data: bytes) -> None:
    """One input: the bytes are choices, of a command, of its members, of their values."""
    vm, client = vm_and_client()
    choices = Choices(data)
    for number in range(1 + choices.below(3)):
        one_call(vm, client, choices, number)


@functools.cache
def vm_and_client() -> tuple[FakeVm, FakeClient]:
    """The same for all inputs; nothing here runs a loop."""
    vm = a_vm()
    client = vm.client()
    client.negotiate()
    return vm, client


def one_call(vm: FakeVm, client: FakeClient, choices: Choices, number: int) -> None:
    """One command with arguments half by the schema and half at random."""
    schema = vm.control.dispatcher.schema
    names = sorted(schema.commands.keys() - NEED_A_LOOP)
    name = choices.of(names)
    located = schema.commands[name].arguments.resolve()
    arguments = {
        key: fitting(located.child(node), choices) if choices.below(4) else anything(choices)
        for key, node in located.node.get("properties", {}).items()
        if choices.below(3)
    }
    if choices.below(8) == 0:
        arguments[choices.of(TEXTS)] = anything(choices)
    before = vm.migrator.query_parameters()
    request = {"execute": name, "arguments": arguments, "id": number}
    lines = client.say(json.dumps(request).encode()).split(b"\r\n")[:-1]
    lines = [line for line in lines if "event" not in json.loads(line)]
    assert len(lines) == 1, (request, lines)
    check_reply(lines[0])
    reply = json.loads(lines[0])
    assert reply["id"] == number
    if "error" in reply:
        assert "Internal error" not in reply["error"]["desc"], (request, reply)
        assert vm.migrator.query_parameters() == before, (request, reply)


class Choices:
    """Bytes as a source of choices; when they are used up, a generator that they seed goes on."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._more = random.Random(data)

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        if self._position < len(self._data):
            self._position += 1
            return self._data[self._position - 1] % limit
        return self._more.randrange(limit)

    def of(self, things: Any) -> Any:
        """One of these."""
        return things[self.below(len(things))]


def fitting(located: Any, choices: Choices) -> Any:
    """A value of about the right type."""
    located = located.resolve()
    node = located.node
    if "anyOf" in node:
        return fitting(located.child(choices.of(node["anyOf"])), choices)
    if "enum" in node:
        return choices.of(node["enum"])
    makers: dict[str, Callable[[], Any]] = {
        "object": lambda: {
            key: fitting(located.child(child), choices)
            for key, child in node.get("properties", {}).items()
            if key in node.get("required", ()) or choices.below(2)
        },
        "array": lambda: [fitting(located.child(node["items"]), choices) for _ in range(choices.below(4))],
        "integer": lambda: choices.of(LIMITS),
        "number": lambda: choices.of((0.5, -1e300, *LIMITS)),
        "boolean": lambda: bool(choices.below(2)),
        "null": lambda: None,
    }
    return makers.get(node.get("type", ""), lambda: choices.of(TEXTS))()


def anything(choices: Choices, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = choices.below(6 if depth > 3 else 8)
    if kind == 6:
        return [anything(choices, depth + 1) for _ in range(choices.below(4))]
    if kind == 7:
        return {choices.of(TEXTS): anything(choices, depth + 1) for _ in range(choices.below(4))}
    return (None, True, choices.of(LIMITS), 1.5, choices.of(TEXTS), False)[kind]
