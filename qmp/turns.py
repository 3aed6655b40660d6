"""Whose commands run next, when several clients have sent more than can be executed at once.

A client that has just been heard gets a short turn at once; a single command if others are waiting, or many
were heard in the same pass of the loop. What it has left waits here, behind what others have left. In one
pass these get a few milliseconds together, so that a client with a single command waits for one pass, however
many others send thousands.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["TURN_S", "Turns"]

FIRST_TURN_S: Final = 0.001
"""For a client that was just heard, when no other waits."""
TURN_S: Final = 0.001
"""For a client that has more left; short enough for others, long enough to send many replies in one go."""
PASS_S: Final = 0.005
"""For all of these in one pass of the loop; a quarter of the 20 ms promised."""


class Turns:
    """The queue of one server's clients."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._pass_began: float | None = None  # when the first client was heard in this pass

    @property
    def first_turn_s(self) -> float:
        """How long a client that was just heard may execute; it may execute one command in any case."""
        now = time.monotonic()
        if self._pass_began is None:
            self._pass_began = now
            self._loop.call_soon(self._end_pass)
        return 0.0 if self._waiting or now - self._pass_began > PASS_S else FIRST_TURN_S

    def _end_pass(self) -> None:
        self._pass_began = None

    def later(self, turn: Callable[[], None]) -> None:
        """Have `turn` called soon, after those that wait. It may ask for another one."""
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        until = time.monotonic() + PASS_S
        try:
            for _ in range(len(self._waiting)):
                # What is called stays in the queue meanwhile: if it asks again there is one pass, not two.
                try:
                    self._waiting[0]()
                finally:
                    self._waiting.popleft()
                if time.monotonic() > until:
                    break
        finally:  # a bug in one client's turn is not the end of the others
            if self._waiting:
                self._loop.call_soon(self._pass)
