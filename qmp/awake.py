"""Waits a moment for a client that sends its next command as soon as it has the reply.

To be woken takes a process longer than a short command takes to be executed. So after a reply a connection
looks for the next command for AWAKE_S, if the last one came that soon; the kernel does the same for virtual
CPUs that halt (Linux, Documentation/virt/kvm/halt-polling.rst). After TURN_S of this the loop has its turn. A
client that asks now and then finds the loop asleep and costs nothing.
"""

from __future__ import annotations

import select
import time
from typing import Final

__all__ = ["AWAKE_S", "TURN_S", "Awake"]

AWAKE_S: Final = 0.0001
"""Longer than most clients need to be woken and to send. Arbitrary."""
TURN_S: Final = 0.0005
"""What others wait for at most. Arbitrary: some ten commands."""


class Awake:
    """The moments between one client's commands."""

    def __init__(self, input_fd: int) -> None:
        self._poll = select.poll()
        self._poll.register(input_fd, select.POLLIN)
        self._asks_at_once = False
        self._turn_ends_s = 0.0
        self._answered_s = 0.0

    def begin_turn(self) -> None:
        """The loop says that there is input."""
        now = time.monotonic()
        self._asks_at_once = now - self._answered_s < AWAKE_S
        self._turn_ends_s = now + TURN_S

    def hears_more(self) -> bool:
        """All is answered: whether there is more input, which is waited for if that is likely to pay."""
        self._answered_s = now = time.monotonic()
        if not self._asks_at_once:
            return False
        until = min(now + AWAKE_S, self._turn_ends_s)
        while now < until:
            if self._poll.poll(0):
                return True
            now = time.monotonic()
        self._asks_at_once = False
        return False
