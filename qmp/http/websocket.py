"""One QMP client over a WebSocket: each text frame holds whole JSON messages in, exactly one out.

    WebSocketResponse --frames--> Session --> Dispatcher --> Session --frames--> WebSocketResponse

The protocol is that of `qmp.session`; what differs from a socket:

1. A message ends with its frame. One that does not gets the error of a bad message, and the next frame is
   read from its start. A binary frame ends the connection.
2. There is no half-close: when the client closes, what runs is finished, but not answered.
3. No descriptors come this way.

The bounds are those of `qmp.connection`: nothing is read while the in-flight queue is full or 1 MiB of output
waits; a client that lets 1 MiB of events pile up is disconnected, and here also one that takes nothing at
all for `STALL_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from typing import Final

from aiohttp import WSCloseCode, WSMsgType, web

from qmp.connection import EVENT_BYTES, HIGH_WATER_BYTES
from qmp.dispatcher import Dispatcher
from qmp.events import EventHub
from qmp.fds import FdStore
from qmp.json_stream import MAX_MESSAGE_BYTES
from qmp.session import Session

__all__ = ["STALL_S", "WebSocketClient", "new_socket"]

_log = logging.getLogger(__name__)

STALL_S: Final = 30.0
"""Arbitrary."""
_CLOSE_S: Final = 1.0
"""How long the client may take to answer a close frame."""
_TURN_S: Final = 0.005
"""As in `qmp.connection`."""
_RESET: Final = b"\x00\n"
"""A control byte takes the reader out of any message, the line feed ends the search for the next one."""


def new_socket() -> web.WebSocketResponse[bool]:
    """A WebSocket with our limits; text comes as bytes, since QMP has its own error for what is no UTF-8."""
    return web.WebSocketResponse(
        timeout=_CLOSE_S, compress=False, max_msg_size=MAX_MESSAGE_BYTES + 1, decode_text=False
    )


class WebSocketClient:
    """A client, from its greeting to its end; fits `qmp.dispatcher.Client`."""

    def __init__(
        self,
        wire: web.WebSocketResponse[bool],
        transport: asyncio.WriteTransport,
        dispatcher: Dispatcher,
        hub: EventHub,
        *,
        held: bool,
    ) -> None:
        """`wire` is prepared, on `transport`. `held`: greet, but execute nothing before `release`."""
        self.session = Session(dispatcher.greeting)
        self.fds = FdStore()
        self._wire = wire
        self._transport = transport
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._held = held
        self._may_read = asyncio.Event()
        self._has_output = asyncio.Event()
        self._sending_bytes = 0
        self._event_bytes = 0  # of events, since all output was last sent
        self._pumping = False
        self._ended = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe = hub.subscribe(self._on_event)
        self._writer = asyncio.create_task(self._write())

    async def run(self) -> None:
        """Serve the client to its end, whoever ends it."""
        self._has_output.set()
        self._pump()
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait((reader, self._writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._end()
            for task in (reader, self._writer):
                task.cancel()
            await asyncio.gather(reader, self._writer, *self._tasks, return_exceptions=True)

    def release(self) -> None:
        """Begin to execute."""
        self._held = False
        self._pump()

    async def close(self, flush_s: float) -> None:
        """Send what waits, for at most `flush_s` seconds, then say goodbye."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(flush_s):
                while self._unsent_bytes() and not self._ended:
                    await asyncio.sleep(0.001)
        self._end()
        await self._wire.close(code=WSCloseCode.GOING_AWAY)

    def _end(self) -> None:
        self._ended = True
        self._unsubscribe()
        self.fds.close()
        self._has_output.set()
        self._may_read.set()

    def _abort(self, why: str) -> None:
        _log.warning("QMP client disconnected: %s", why)
        self._end()
        self._transport.abort()

    # Section: input and execution

    async def _read(self) -> None:
        while True:
            await self._may_read.wait()
            if self._ended:
                return
            frame = await self._wire.receive()
            if frame.type is WSMsgType.BINARY:
                await self._wire.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"QMP is text")
            if frame.type is not WSMsgType.TEXT:
                return
            assert isinstance(frame.data, bytes)
            self._may_read.clear()
            self.session.receive_data(frame.data)
            self.session.receive_data(b"\n")
            self._pump()

    def _pump(self) -> None:
        """Execute what can be executed now and decide whether to read on."""
        if self._ended or self._pumping or self._held:
            return
        self._pumping = True
        drained = False
        deadline_s = time.monotonic() + _TURN_S
        while self._unsent_bytes() <= HIGH_WATER_BYTES:
            request = self.session.next_request()
            if request is None:
                drained = not self.session.is_paused
                break
            unfinished = self._dispatcher.execute(self, request)
            if unfinished is not None:
                self._run(unfinished)
            if time.monotonic() > deadline_s:
                break
        self._pumping = False
        if self.session.unsent_bytes:
            self._has_output.set()
        wants_data = drained and self.session.wants_data
        if wants_data and self.session.is_mid_message:
            self.session.receive_data(_RESET)
            drained = wants_data = False
        if self.session.is_finished:
            self._has_output.set()
        elif wants_data:
            self._may_read.set()
        elif not drained and self._unsent_bytes() <= HIGH_WATER_BYTES:
            self._loop.call_soon(self._pump)

    def _run(self, unfinished: Awaitable[None]) -> None:
        task = asyncio.ensure_future(unfinished)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._pump()

    def _on_event(self, event: dict[str, object], line: bytes) -> None:
        self.session.send_event(event, line)
        self._event_bytes += len(line)
        if self._event_bytes > EVENT_BYTES:
            self._abort("it does not read its events")
        elif self.session.unsent_bytes:
            self._has_output.set()

    # Section: output

    def _unsent_bytes(self) -> int:
        return self._sending_bytes + self.session.unsent_bytes

    async def _write(self) -> None:
        """Send each line as a frame; ends when the client is gone or has had its chance."""
        while not self._ended:
            await self._has_output.wait()
            self._has_output.clear()
            data = self.session.data_to_send()
            self._sending_bytes = len(data)
            for line in data.split(b"\r\n")[:-1]:
                try:
                    async with asyncio.timeout(STALL_S):
                        await self._wire.send_frame(line, WSMsgType.TEXT)
                except TimeoutError:
                    self._abort(f"it took nothing for {STALL_S:.0f} s")
                    return
                except ConnectionError:
                    return
                self._sending_bytes -= len(line) + 2
            if not self.session.unsent_bytes:
                self._event_bytes = 0
            self._pump()
            if self.session.is_finished and not self._unsent_bytes():
                await self._wire.close(code=WSCloseCode.POLICY_VIOLATION, message=b"This is no QMP")
                return
