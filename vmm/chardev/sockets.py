"""A character backend on a socket: it listens for one client at a time, or connects out."""

from __future__ import annotations

import asyncio
import logging
import socket

from qmp.sockets import OwnFile, open_connection, open_listener
from vmm.chardev.address import socket_address
from vmm.chardev.backend import Backend
from vmm.chardev.wires import SocketWire
from vmm.config import ChardevConfig

__all__ = ["SocketBackend"]

log = logging.getLogger(__name__)


class SocketBackend(Backend):
    """QEMU's socket chardev, without TLS, telnet and websocket."""

    def __init__(self, config: ChardevConfig, loop: asyncio.AbstractEventLoop) -> None:
        address = socket_address(config)
        super().__init__(config.id, address.describe(), loop)
        self._config = config
        self._address = address
        self._listener: socket.socket | None = None
        self._file: OwnFile | None = None
        self._client_came = asyncio.Event()
        self._reconnecting: asyncio.Task[None] | None = None
        self._closing = False

    async def open(self) -> None:
        """Listen, or connect. Raises OSError with the address in its text."""
        if self._config.server:
            # The next client waits in the backlog, as with QEMU.
            self._listener = await open_listener(self._address, backlog=1)
            if self._config.path is not None:
                self._file = OwnFile.at(self._config.path)
            self._accept_more(True)
        elif self._config.reconnect_s:
            self._reconnecting = asyncio.ensure_future(self._connect_for_ever())
        else:
            await self._connect()

    async def wait_client(self) -> None:
        """wait=on: until the first client is there."""
        await self._client_came.wait()

    def disconnected(self) -> None:
        if self._closing:
            return
        if self._listener is not None:
            self._accept_more(True)
        elif self._config.reconnect_s:
            self._reconnecting = asyncio.ensure_future(self._connect_for_ever())

    def close(self) -> None:
        self._closing = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self._listener is not None:
            self._accept_more(False)
            self._listener.close()
            self.unlink()
        super().close()

    def unlink(self) -> None:
        """Remove our socket file, unless somebody has put another in its place."""
        if self._file is not None:
            self._file.unlink()

    async def _connect(self) -> None:
        self._take(await open_connection(self._address))

    async def _connect_for_ever(self) -> None:
        while True:
            try:
                await self._connect()
                return
            except OSError as error:
                log.info("%s", error)
            await asyncio.sleep(self._config.reconnect_s)

    def _accept_more(self, wanted: bool) -> None:
        assert self._listener is not None
        if wanted:
            self._loop.add_reader(self._listener.fileno(), self._on_acceptable)
        else:
            self._loop.remove_reader(self._listener.fileno())

    def _on_acceptable(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self._accept_more(False)
        self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        if self._config.nodelay and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connect(SocketWire(sock))
        self._client_came.set()
