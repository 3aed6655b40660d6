"""QMP monitors on the asyncio loop: listening, connecting out, or on descriptors.

    server = QmpServer(dispatcher, hub)               # needs no loop yet
    await server.listen(SocketAddress.unix("/run/qmp", server=True))
    await server.connect(SocketAddress.tcp("127.0.0.1", 4444))     # the client listens, as libvirt's does
    await server.serve_fds(0, 1)                                   # -qmp stdio
    await server.wait_clients()                                    # wait=on
    await server.close()                                           # flush, disconnect, unlink

As in QEMU a listening monitor serves one client at a time and the next waits in the kernel's backlog, without
a greeting, until the first has gone; an address with `exclusive=False` serves all at once. A server holds
many monitors.
`QmpServer(..., held=True)` executes nothing until `release()`, for monitors opened before the machine is up.
Unix sockets are created with mode 0600; a path that exists is replaced, as QEMU does; close() removes it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass, field
from typing import Any

from qmp.address import AddressKind, SocketAddress
from qmp.connection import Connection
from qmp.dispatcher import Dispatcher
from qmp.events import EventHub
from qmp.sockets import OwnFile, open_connection, open_listener
from qmp.turns import Turns
from qmp.wire import PipeWire, SocketWire, Wire

__all__ = ["QmpServer"]

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Monitor:
    """A listening socket and the client it serves."""

    address: SocketAddress
    listener: socket.socket
    file: OwnFile | None
    accepting: bool = False
    client_came: asyncio.Event = field(default_factory=asyncio.Event)


class QmpServer:
    """All monitors of one process. Every method is called on the loop's thread."""

    def __init__(self, dispatcher: Dispatcher, hub: EventHub, *, held: bool = False) -> None:
        """`held`: clients are greeted, but their commands wait until `release`."""
        self._held = held
        self._dispatcher = dispatcher
        self._hub = hub
        self._turns: Turns | None = None
        self._monitors: list[_Monitor] = []
        self._connections: set[Connection] = set()
        self._reconnecting: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def client_count(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def listen(self, address: SocketAddress) -> socket.socket:
        """Listen; gives the socket, whose name has the port if 0 was asked for. Does not wait for a client.

        Raises:
            OSError: the address is in use, too long or not ours.
        """
        listener = await open_listener(address)
        file = OwnFile.at(address.path) if address.kind is AddressKind.UNIX else None
        monitor = _Monitor(address, listener, file)
        self._monitors.append(monitor)
        self._accept_more(monitor, True)
        return listener

    async def connect(self, address: SocketAddress) -> Connection | None:
        """Connect out and serve whoever listens there; or serve a connected descriptor.

        With `reconnect_s` this goes on in the background, again and again, and None is given.

        Raises:
            OSError: nobody listens there.
        """
        if address.reconnect_s:
            task = asyncio.ensure_future(self._stay_connected(address))
            self._reconnecting.add(task)
            return None
        return await self._connect_once(address)

    async def _stay_connected(self, address: SocketAddress) -> None:
        while True:
            try:
                await (await self._connect_once(address)).wait_closed()
            except OSError as error:
                _log.info("%s", error)
            await asyncio.sleep(address.reconnect_s)

    async def _connect_once(self, address: SocketAddress) -> Connection:
        return self._serve(SocketWire(await open_connection(address)), address.pretty)

    async def serve_fds(self, in_fd: int, out_fd: int, *, pretty: bool = False) -> Connection:
        """Serve a client on two descriptors, which stay the caller's. End of file ends the connection."""
        return self._serve(PipeWire(in_fd, out_fd), pretty)

    def release(self) -> None:
        """From now on commands are executed: what they act on is there."""
        self._held = False
        for connection in list(self._connections):
            connection.release()

    async def wait_clients(self) -> None:
        """Wait until each listening monitor with `wait` has had its first client."""
        for monitor in self._monitors:
            if monitor.address.wait and not monitor.client_came.is_set():
                _log.info("Waiting for a client on %s", monitor.address.describe())
                await monitor.client_came.wait()

    async def close(self, flush_s: float = 1.0) -> None:
        """Stop listening, send what clients are still owed for at most `flush_s` seconds, disconnect."""
        self._closing = True
        for task in self._reconnecting:
            task.cancel()
        for monitor in self._monitors:
            self._accept_more(monitor, False)
            monitor.listener.close()
            if monitor.file is not None:
                monitor.file.unlink()
        self._monitors.clear()
        await asyncio.gather(*(connection.close(flush_s) for connection in list(self._connections)))

    def _accept_more(self, monitor: _Monitor, wanted: bool) -> None:
        if wanted == monitor.accepting:
            return
        monitor.accepting = wanted
        loop = asyncio.get_running_loop()
        if wanted:
            loop.add_reader(monitor.listener.fileno(), self._on_acceptable, monitor)
        else:
            loop.remove_reader(monitor.listener.fileno())

    def _on_acceptable(self, monitor: _Monitor) -> None:
        try:
            sock, _ = monitor.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # EMFILE and friends: the client stays in the backlog; without the pause the loop would spin.
            _log.error("Cannot accept a QMP client: %s", error)
            self._accept_more(monitor, False)
            asyncio.get_running_loop().call_later(1.0, self._reopen, monitor)
            return
        if monitor.address.exclusive:
            self._accept_more(monitor, False)
        self._serve(SocketWire(sock), monitor.address.pretty, monitor)

    def _reopen(self, monitor: _Monitor) -> None:
        if not self._closing:
            self._accept_more(monitor, True)

    def _serve(self, wire: Wire, pretty: bool, monitor: _Monitor | None = None) -> Connection:
        self._turns = self._turns or Turns(asyncio.get_running_loop())
        connection = Connection(
            wire, self._dispatcher, self._hub, pretty=pretty, held=self._held, turns=self._turns
        )
        self._connections.add(connection)
        if monitor is not None:
            monitor.client_came.set()
        connection.when_closed(lambda: self._on_closed(connection, monitor))
        return connection

    def _on_closed(self, connection: Connection, monitor: _Monitor | None) -> None:
        self._connections.discard(connection)
        if monitor is not None:
            self._reopen(monitor)

    def describe(self) -> list[dict[str, Any]]:
        """The listening monitors as query-chardev shows them, labels aside."""
        return [{"filename": monitor.address.describe(), "frontend-open": True} for monitor in self._monitors]
