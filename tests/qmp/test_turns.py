"""Who comes next: in order, few milliseconds a pass, and a newcomer does not wait for the queue."""

from __future__ import annotations

import asyncio
import time

import pytest

from qmp.turns import FIRST_TURN_S, PASS_S, Turns

pytestmark = pytest.mark.asyncio


async def test_in_order_and_again() -> None:
    turns, log = Turns(asyncio.get_running_loop()), []

    def ask(name: str, times: int) -> None:
        log.append(name)
        if times > 1:
            turns.later(lambda: ask(name, times - 1))

    for name in "abc":
        turns.later(lambda name=name: ask(name, 3))  # type: ignore[misc]  # the default binds the name
    while len(log) < 9:
        await asyncio.sleep(0)
    assert "".join(log) == "abcabcabc"


async def test_a_pass_is_short() -> None:
    turns, done = Turns(asyncio.get_running_loop()), []

    def work() -> None:
        until = time.monotonic() + PASS_S / 4
        while time.monotonic() < until:
            pass
        done.append(True)

    for _ in range(40):
        turns.later(work)
    passes = 0
    while len(done) < 40:
        before = len(done)
        await asyncio.sleep(0)
        assert len(done) - before <= 6
        passes += 1
    assert passes >= 8


async def test_a_first_turn_is_for_those_who_are_few() -> None:
    turns = Turns(asyncio.get_running_loop())
    assert turns.first_turn_s == FIRST_TURN_S
    until = time.monotonic() + PASS_S * 1.1
    while time.monotonic() < until:
        pass
    assert turns.first_turn_s == 0  # many were heard in this pass
    await asyncio.sleep(0)
    assert turns.first_turn_s == FIRST_TURN_S
    await asyncio.sleep(0)
    turns.later(lambda: None)
    assert turns.first_turn_s == 0  # somebody waits


async def test_one_that_raises_holds_up_nobody() -> None:
    loop, done, errors = asyncio.get_running_loop(), [], []
    turns = Turns(loop)
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))

    def fail() -> None:
        raise ValueError("a bug")

    for turn in (fail, lambda: done.append(1), fail, lambda: done.append(2)):
        turns.later(turn)
    while len(done) < 2:
        await asyncio.sleep(0)
    assert [str(error) for error in errors] == ["a bug"] * 2
