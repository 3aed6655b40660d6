"""Invariant: whatever bytes come, cut wherever, a QMP session answers in JSON and takes the next command.

no exception; the same messages at any split; every reply is one ASCII line that a strict parser takes,
errors of QEMU's classes; after a reset byte the next command is executed (unless the client was cut off)
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from qmp.errors import JsonSyntaxError
from qmp.json_stream import NOT_READY, JsonStream
from qmp.session import Session

GREETING = {"version": {}, "capabilities": ["oob"]}
LAST = b'\xff{"execute":"last","id":"last"}'

SEEDS = [
    b'\x05{"execute":"query-status","id":1}\r\n{"exec-oob":"x","arguments":{"a":[1,2.5,null]}}',
    b"\x01{'execute':'a','id':'\\u00e9\\'\\\"'}{}[]null true -1e5 \"x\"",
    b'\x09{"a":{"a":1,"b":[{"execute":"x"',
    b'\x40]{[}{"id":%}{"execute":"x","execute":"y"}\x00\xfe' + b"[" * 1030,
    b'\x02{"execute":5}{"foo":1}{"execute":"a","exec-oob":"b"}',
]
TOKENS = b'"execute" "exec-oob" "arguments" "id": { } [ ] \\u \xff null 1e400 \'execute\' [[[[[[[['.split()


def check(data: bytes) -> None:
    """One input: the first byte says how the rest is cut."""
    step, data = (data[0] if data else 0) + 1, data[1:]
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    assert messages([data]) == messages(pieces)
    session = Session(GREETING)
    session.negotiate(["oob"])
    session.data_to_send()
    executed: list[Any] = []
    for piece in [*pieces, LAST]:
        session.receive_data(piece)
        execute(session, executed)
    output = session.data_to_send()
    for line in output.split(b"\r\n")[:-1]:
        check_reply(line)
    assert executed[-1:] == ["last"] or b"This is not QMP" in output


def messages(pieces: list[bytes]) -> list[Any]:
    """What the stream makes of these bytes."""
    stream, found = JsonStream(), []
    for piece in pieces:
        stream.feed(piece)
        while (message := stream.next_message()) is not NOT_READY or stream.is_paused:
            if message is not NOT_READY:
                found.append(str(message) if isinstance(message, JsonSyntaxError) else repr(message))
    return found


def execute(session: Session, executed: list[Any]) -> None:
    """Answer every request with its id."""
    while (request := session.next_request()) is not None or session.is_paused:
        if request is not None:
            executed.append(request.name)
            session.respond(request, {"name": request.name})


def check_reply(line: bytes) -> None:
    """A reply on the wire."""
    reply = json.loads(line.decode("ascii"), parse_constant=refuse)
    assert ("return" in reply) != ("error" in reply)
    if "error" in reply:
        assert reply["error"]["class"] in ("GenericError", "CommandNotFound", "DeviceNotActive"), reply
        assert reply["error"]["desc"]


def refuse(constant: str) -> NoReturn:
    """NaN and its like are not JSON."""
    raise AssertionError(constant)
