"""One connection through a fault proxy: a client, its server, and a pump for each direction.

    client --recv--> Plan.feed --> bytes to pass on, actions to take --send--> server        and the other way

A pump does what its plan says at the offset it has come to; `Connection.add` acts between two of its steps,
on the same loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from tools.faultproxy_rules import Action, Direction, Plan, Rule, Verb
from tools.faultproxy_sockets import (
    CHUNK_BYTES,
    Address,
    arm_reset,
    close_with_reset,
    connected_socket,
    drain,
)

__all__ = ["Connection"]

DRAIN_S = 0.2
"""How long what the receiver of a cut direction sends is still taken, and goes nowhere: closed at once, TCP
would send it a reset, and it might lose what came before the cut. The sender is told at once."""
SLICE_S = 0.02
"""A throttled stream comes in so long slices: small enough to look smooth to a postcopy guest."""


class Connection:
    """A client, its server, and a pump for each direction."""

    def __init__(
        self, number: int, client: socket.socket, plans: dict[Direction, Plan], say: Callable[[str], None]
    ) -> None:
        self.number = number
        self._client = client
        self._server: socket.socket | None = None
        self._plans = plans
        self._say = say
        self._rates = dict.fromkeys(Direction, 0.0)
        self._flowing = {direction: asyncio.Event() for direction in Direction}
        self._finished: set[Direction] = set()
        self._receiver: socket.socket | None = None  # of the direction that was cut
        self._task: asyncio.Task[None] | None = None
        for event in self._flowing.values():
            event.set()

    def start(self, target: Address) -> None:
        """Connect to the server and begin to pump."""
        self._client.setblocking(False)
        self._task = asyncio.create_task(self._run(target))

    async def _run(self, target: Address) -> None:
        try:
            self._server = await connected_socket(target)
        except OSError as error:
            self._tell(f"no server: {error}")
            close_with_reset(self._client)
            return
        self._tell("open")
        pumps = [asyncio.create_task(self._pump(direction)) for direction in Direction]
        try:
            await asyncio.gather(*pumps)
        finally:
            self._finished = set(Direction)
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
                await self._close_sockets()
            finally:
                self._client.close()
                self._server.close()
                self._tell("closed")

    async def _close_sockets(self) -> None:
        for end in self._ends(Direction.TO_SERVER):
            if end is not self._receiver:
                end.close()
        if self._receiver is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(drain(self._receiver), DRAIN_S)

    async def close(self) -> None:
        """End it if it stands."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # ---- what users want

    @property
    def is_open(self) -> bool:
        """Do bytes still pass?"""
        return self._task is not None and not self._task.done() and len(self._finished) < len(Direction)

    def status(self) -> dict[str, Any]:
        """For the control socket."""
        offsets = {direction.value: self._plans[direction].offset for direction in Direction}
        stalled = [direction.value for direction in Direction if not self._flowing[direction].is_set()]
        return {"connection": self.number, "open": self.is_open, **offsets, "stalled": stalled}

    def add(self, direction: Direction, rule: Rule) -> None:
        """One more rule; one for now acts at once. Raises RuleError if its place is past."""
        if not self.is_open:
            return
        if rule.low is None:
            self._act_now(direction, rule.action)
        elif rule.connection or rule.low >= self._plans[direction].offset:
            self._plans[direction].add(rule.low, rule.action)

    def clear(self) -> None:
        """Forget all rules, and what they have set."""
        for direction in Direction:
            self._plans[direction].clear()
            self._rates[direction] = 0.0
        self.resume()

    def resume(self) -> None:
        """What is stalled goes on."""
        for event in self._flowing.values():
            event.set()

    # ---- the pumps

    def _ends(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        assert self._server is not None
        ends = self._client, self._server
        return ends if direction is Direction.TO_SERVER else ends[::-1]

    async def _pump(self, direction: Direction) -> None:
        loop = asyncio.get_running_loop()
        source, sink = self._ends(direction)
        data = b""
        try:
            while True:
                for step in self._plans[direction].feed(data):
                    if isinstance(step, bytes):
                        await self._pass(direction, sink, step)
                    else:
                        await self._act(direction, step)
                await self._flowing[direction].wait()
                data = await loop.sock_recv(source, CHUNK_BYTES)
                if not data:
                    break
        except OSError:
            self._end_both()  # the one side is gone, and the other is to know
        self._finish(direction)

    async def _pass(self, direction: Direction, sink: socket.socket, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        await self._flowing[direction].wait()
        if direction in self._finished:
            return
        while data and (rate := self._rates[direction]):
            size = max(1, int(rate * SLICE_S))
            await loop.sock_sendall(sink, data[:size])
            data = data[size:]
            await asyncio.sleep(min(size, int(rate) or 1) / rate)
        if data:
            await loop.sock_sendall(sink, data)

    async def _act(self, direction: Direction, action: Action) -> None:
        self._act_now(direction, action)
        if action.verb is Verb.STALL:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(action.argument):
                    await self._flowing[direction].wait()
            self._flowing[direction].set()
        elif action.verb in (Verb.CUT, Verb.RESET):
            await asyncio.get_running_loop().create_future()  # `_stop` has cancelled us

    def _act_now(self, direction: Direction, action: Action) -> None:
        self._tell(f"{direction.value} {self._plans[direction].offset}: {action}")
        match action.verb:
            case Verb.STALL:
                self._flowing[direction].clear()
            case Verb.THROTTLE:
                self._rates[direction] = action.argument or 0.0
            case Verb.HALF_CLOSE:
                self._finish(direction)
            case Verb.RESET:
                for end in self._ends(direction):
                    with contextlib.suppress(OSError):
                        arm_reset(end)
                self._stop()
            case Verb.CUT:
                self._receiver = self._ends(direction)[1]
                self._end_both()

    def _finish(self, direction: Direction) -> None:
        """This direction ends; its receiver reads that."""
        if direction not in self._finished:
            self._finished.add(direction)
            with contextlib.suppress(OSError):
                self._ends(direction)[1].shutdown(socket.SHUT_WR)

    def _end_both(self) -> None:
        for direction in Direction:
            self._finish(direction)
        self._stop()

    def _stop(self) -> None:
        """The pumps end, and `_run` closes both sockets."""
        self._finished = set(Direction)
        self.resume()
        assert self._task is not None
        self._task.cancel()

    def _tell(self, text: str) -> None:
        self._say(f"connection {self.number}: {text}")
