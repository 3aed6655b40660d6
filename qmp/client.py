"""A QMP client for asyncio: a connection that executes commands and tells events, for any QMP server.

    client = await QmpClient.connect("/run/qmp")            # or ("127.0.0.1", 4444)
    status = await client.execute("query-status")
    events = client.events()                                # from here on none is missed
    await client.execute("cont")
    async for event in events:                              # {"event": ..., "data": ..., "timestamp": ...}
        ...
    await client.close()

Many tasks may execute commands at once; replies are told apart by their id. `vmm.client` puts typed methods
on top. Its own little transport, since asyncio's streams cannot pass descriptors along with bytes.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Self

from qmp.address import SocketAddress

__all__ = ["CommandFailed", "Disconnected", "EventStream", "QmpClient"]

READ_BYTES: Final = 1 << 16
MAX_LINE_BYTES: Final = 64 << 20
"""QEMU's own schema is 200 KB; a server that sends this much without a line's end is none."""


class CommandFailed(Exception):
    """The server refused a command: `error_class` and the text are its."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.command = command
        self.error_class = error_class


class Disconnected(Exception):
    """The connection is gone, or what is at its other end does not speak QMP."""


class EventStream:
    """The events of one connection since the stream was made, in order. Iterate over it, or call `next`."""

    def __init__(self, listeners: set[EventStream]) -> None:
        self._listeners = listeners
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        listeners.add(self)

    def put(self, event: dict[str, Any] | None) -> None:
        """One more event; None when the connection has ended."""
        self._queue.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        event = await self._queue.get()
        if event is None:
            self._queue.put_nowait(None)
            raise StopAsyncIteration
        return event

    async def next(self, *names: str) -> dict[str, Any]:
        """The next event, or the next with one of these names; others before it are dropped.

        Raises:
            Disconnected: the connection ended before.
        """
        async for event in self:
            if not names or event["event"] in names:
                return event
        raise Disconnected(f"The connection ended before {' or '.join(names) or 'an event'}")

    def close(self) -> None:
        """No more events are kept for this stream."""
        self._listeners.discard(self)


class QmpClient:
    """One connection, negotiated. Use `connect`; or as an async context manager."""

    def __init__(self, sock: socket.socket) -> None:
        """Own a connected socket. `negotiate` comes next."""
        sock.setblocking(False)
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._listeners: set[EventStream] = set()
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._buffer = bytearray()
        self.greeting: dict[str, Any] = {}

    @classmethod
    async def connect(cls, address: str | tuple[str, int], *, oob: bool = True) -> Self:
        """Connect to a unix socket's path or a TCP address, and negotiate.

        Raises:
            OSError: nobody listens there.
            Disconnected: whoever listens does not speak QMP.
        """
        where = SocketAddress.unix(address) if isinstance(address, str) else SocketAddress.tcp(*address)
        family, name = await where.resolve()
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, name)
            client = cls(sock)
            await client.negotiate(oob=oob)
        except BaseException:
            sock.close()
            raise
        return client

    async def negotiate(self, *, oob: bool = True) -> None:
        """Read the greeting and enter command mode, with out-of-band execution if wanted and offered."""
        try:
            greeting = json.loads(await self._line())["QMP"]
            capabilities = [name for name in greeting["capabilities"] if name == "oob" and oob]
        except (ValueError, KeyError, TypeError) as error:
            raise Disconnected("No QMP greeting") from error
        self.greeting = greeting
        self._reader = asyncio.create_task(self._read())
        await self.execute("qmp_capabilities", {"enable": capabilities} if capabilities else {})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        oob: bool = False,
        fds: Sequence[int] = (),
    ) -> Any:
        """Execute a command and give what it returns. `fds` go with it; they stay the caller's.

        Raises:
            CommandFailed: the server refused it.
            Disconnected: the connection ended before the reply; whether it was executed is not known.
        """
        if self._reader is None or self._reader.done():
            raise Disconnected("The connection is closed")
        id_ = next(self._ids)
        request = {"exec-oob" if oob else "execute": command, "arguments": arguments or {}, "id": id_}
        future = self._waiting[id_] = self._loop.create_future()
        try:
            try:
                await self._send(json.dumps(request).encode() + b"\n", fds)
            except OSError as error:
                raise Disconnected(f"Could not send '{command}': {error.strerror}") from error
            reply = await future
        finally:
            del self._waiting[id_]
        if "error" in reply:
            raise CommandFailed(command, reply["error"]["class"], reply["error"]["desc"])
        return reply["return"]

    def events(self) -> EventStream:
        """Events from now on, until the connection ends. Each stream gets all of them."""
        stream = EventStream(self._listeners)
        if self._reader is None or self._reader.done():
            stream.put(None)
        return stream

    async def wait_closed(self) -> None:
        """Wait until the server hangs up."""
        if self._reader is not None:
            await asyncio.wait({self._reader})

    async def close(self) -> None:
        """Hang up. Once is enough."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._socket.close()

    # Section: the wire

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            if fds:
                # A lone byte of white space carries them: it fits whatever else waits in the socket.
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                self._socket.sendmsg([b" "], rights)
            await self._loop.sock_sendall(self._socket, data)

    async def _line(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_LINE_BYTES:
                raise Disconnected(f"A line of more than {MAX_LINE_BYTES} bytes")
            try:
                data = await self._loop.sock_recv(self._socket, READ_BYTES)
            except OSError as error:
                raise Disconnected(f"The connection was lost: {error.strerror}") from error
            if not data:
                raise Disconnected("The server has hung up")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def _read(self) -> None:
        """Hand out what comes. When it ends, so does every wait."""
        end: Exception = Disconnected("The connection was closed")
        try:
            while True:
                self._hand_out(json.loads(await self._line()))
        except Disconnected as error:
            end = error
        except (ValueError, TypeError, AttributeError) as error:
            end = Disconnected(f"What came is not QMP: {error}")
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(end)
            for stream in self._listeners:
                stream.put(None)

    def _hand_out(self, message: dict[str, Any]) -> None:
        if "event" in message:
            for stream in self._listeners:
                stream.put(message)
            return
        future = self._waiting.get(message.get("id", 0))
        if future is not None and not future.done():
            future.set_result(message)
        elif "id" not in message:
            raise ValueError(message.get("error", {}).get("desc", "a reply to nothing"))
