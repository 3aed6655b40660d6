"""The in-flight queue, out-of-band requests, end of input; what the recorded replies do not cover."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp.errors import GenericError
from qmp.json_stream import MAX_MESSAGE_BYTES
from qmp.session import MAX_BAD_MESSAGES_IN_A_ROW, RawJson, Request, Session

GREETING = {"version": {}, "capabilities": ["oob"]}


def negotiated(*capabilities: str) -> Session:
    session = Session(GREETING)
    session.negotiate(list(capabilities))
    session.data_to_send()
    return session


def command(number: int, key: str = "execute") -> bytes:
    return json.dumps({key: "c", "id": number}).encode()


def ids(data: bytes) -> list[Any]:
    return [json.loads(line).get("id") for line in data.split(b"\r\n") if line]


def take(session: Session) -> Request:
    request = session.next_request()
    assert request is not None
    return request


def test_without_oob_one_request_at_a_time() -> None:
    session = negotiated()
    session.receive_data(command(1) + command(2) + b"{}")
    first = take(session)
    assert session.next_request() is None
    assert not session.wants_data
    session.respond(first, None)
    session.respond(take(session), {"a": 1})
    assert session.next_request() is None
    assert session.wants_data
    assert ids(session.data_to_send()) == [1, 2, None]


def test_with_oob_eight_in_flight_and_urgent_ones_overtake() -> None:
    session = negotiated("oob")
    session.receive_data(
        b"".join(command(n) for n in range(7)) + command(100, "exec-oob") + command(7) + command(8)
    )
    running = take(session)
    urgent = take(session)
    assert (running.id, urgent.id, urgent.oob) == (0, 100, True)
    session.respond(urgent, None)
    assert session.next_request() is None
    assert not session.wants_data
    session.receive_data(command(101, "exec-oob"))
    assert session.next_request() is None, "the queue is full: nothing is read"
    session.respond(running, None)
    order = [take(session).id]
    assert order == [1]


def test_errors_keep_their_place_in_the_queue() -> None:
    session = negotiated("oob")
    session.receive_data(command(1) + b"[]" + b'{"exec-oob":5,"id":9}' + command(2))
    first = take(session)
    assert session.next_request() is None
    assert ids(session.data_to_send()) == [9]
    session.respond(first, None)
    session.respond(take(session), None)
    assert ids(session.data_to_send()) == [1, None, 2]


def test_end_of_input_leaves_what_was_received() -> None:
    session = negotiated()
    session.receive_data(command(1) + command(2) + b'{"execute"')
    session.receive_eof()
    assert not session.wants_data
    session.respond(take(session), None)
    session.respond(take(session), None)
    assert session.next_request() is None
    assert session.is_finished


@pytest.mark.parametrize("garbage", [b"%\n", b"5 ", b"{}", b'{"execute":5}'])
def test_a_client_that_only_sends_garbage_is_cut_off(garbage: bytes) -> None:
    session = negotiated()
    session.receive_data(garbage * (MAX_BAD_MESSAGES_IN_A_ROW + 50) + command(1))
    turns = 1
    assert session.next_request() is None
    while session.is_paused:  # others get their turns
        assert session.next_request() is None
        turns += 1
    assert turns > 5
    assert session.is_finished
    output = session.data_to_send()
    assert len(ids(output)) == MAX_BAD_MESSAGES_IN_A_ROW + 1
    assert b"1000 bad messages in a row, closing the connection" in output


def test_garbage_without_an_end_costs_one_error() -> None:
    session = negotiated()
    for _ in range(100):
        session.receive_data(b"\xff%" * 1000)
        assert session.next_request() is None
    assert len(ids(session.data_to_send())) == 1


def test_a_bad_message_longer_than_any_good_one_is_cut_off_with_the_one_error() -> None:
    session = negotiated()
    for _ in range(MAX_MESSAGE_BYTES // 65536 + 2):
        session.receive_data(b"]" * 65536)
        assert session.next_request() is None
    assert session.is_finished
    output = session.data_to_send()
    assert len(ids(output)) == 1
    assert b"JSON parse error" in output


def test_results_that_are_json_already() -> None:
    session = negotiated()
    session.receive_data(command(1))
    session.respond(take(session), RawJson("[1]"))
    assert session.data_to_send() == b'{"return": [1], "id": 1}\r\n'


def test_a_result_that_is_not_json_leaves_the_session_whole() -> None:
    session = negotiated()
    session.receive_data(command(1))
    request = take(session)
    for bad in (object(), float("inf")):
        with pytest.raises((TypeError, ValueError)):
            session.respond(request, bad)
    session.fail(request, GenericError("x"))
    assert ids(session.data_to_send()) == [1]


def test_unknown_capability_enables_nothing() -> None:
    session = Session({"version": {}, "capabilities": []})
    with pytest.raises(GenericError, match="Capability oob not available"):
        session.negotiate(["oob"])
    assert not session.negotiated


@given(st.lists(st.sampled_from(["in", "oob", "bad", "finish"]), max_size=40), st.booleans())
def test_every_request_is_answered_once_and_in_band_ones_in_order(steps: list[str], oob: bool) -> None:
    session = negotiated(*(["oob"] if oob else []))
    pending: list[Request] = []
    sent: list[Any] = []
    answered: list[Any] = []
    for number, step in enumerate(steps):
        if step == "finish" and pending:
            session.respond(pending.pop(0), None)
        elif step == "bad":
            session.receive_data(b"[]")
        elif step in ("in", "oob"):
            session.receive_data(command(number, "execute" if step == "in" else "exec-oob"))
            sent.append(number)
        while (request := session.next_request()) is not None:
            pending.append(request)
        assert sum(not request.oob for request in pending) <= 1
        answered += ids(session.data_to_send())
    while pending:
        session.respond(pending.pop(0), None)
        while (request := session.next_request()) is not None:
            pending.append(request)
    answered += ids(session.data_to_send())
    assert sorted(number for number in answered if number is not None) == sent
    in_band = [number for number in answered if number is not None and steps[number] == "in"]
    assert in_band == sorted(in_band)
