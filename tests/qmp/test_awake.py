"""Who is waited for: the client that asked at once, for a moment, and never for longer than a turn."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from qmp import awake
from qmp.awake import AWAKE_S, TURN_S, Awake

TICK_S = 0.00001


class Clock:
    """Every look at it takes a tick."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        self.now_s += TICK_S
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(awake, "time", clock)
    return clock


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    client, server = socket.socketpair()
    with client, server:
        yield client, server


def waited_s(clock: Clock, one: Awake) -> float:
    before_s = clock.now_s
    assert not one.hears_more()
    return clock.now_s - before_s


def test_the_client_that_asked_at_once_is_waited_for_a_moment(
    clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    one = Awake(ends[1].fileno())
    one.begin_turn()
    assert waited_s(clock, one) < 2 * TICK_S  # nothing is known of it yet
    one.begin_turn()
    assert AWAKE_S <= waited_s(clock, one) < AWAKE_S + 3 * TICK_S
    assert waited_s(clock, one) < 2 * TICK_S  # it did not come: no second wait


def test_the_client_that_takes_its_time_is_not_waited_for(
    clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    one = Awake(ends[1].fileno())
    for _ in range(3):
        one.begin_turn()
        assert waited_s(clock, one) < 2 * TICK_S
        clock.now_s += AWAKE_S


def test_a_turn_ends_even_if_commands_keep_coming(
    clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, server = ends
    one = Awake(server.fileno())
    one.begin_turn()
    assert not one.hears_more()
    one.begin_turn()
    began_s = clock.now_s
    client.send(b"{}")
    while one.hears_more():
        clock.now_s += 3 * TICK_S
    assert TURN_S <= clock.now_s - began_s < TURN_S + AWAKE_S
