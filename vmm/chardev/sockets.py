"""A character backend on a socket: it listens for one client at a time, or connects out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from typing import Any

from vmm.chardev.backend import Backend
from vmm.chardev.wires import SocketWire
from vmm.config import ChardevConfig

__all__ = ["SocketBackend"]

log = logging.getLogger(__name__)


class SocketBackend(Backend):
    """QEMU's socket chardev, without TLS, telnet and websocket."""

    def __init__(self, config: ChardevConfig, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(config.id, describe(config), loop)
        self._config = config
        self._listener: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._client_came = asyncio.Event()
        self._reconnecting: asyncio.Task[None] | None = None
        self._closing = False

    async def open(self) -> None:
        """Listen, or connect. Raises OSError with the address in its text."""
        if self._config.server:
            self._listener = await self._listen()
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
        path, inode, self._inode = self._config.path, self._inode, None
        if path is not None and inode is not None:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if (status.st_dev, status.st_ino) == inode:
                    os.unlink(path)

    async def _listen(self) -> socket.socket:
        config = self._config
        if config.fd is not None:
            listener = socket.socket(fileno=config.fd)
            listener.setblocking(False)
            return listener
        family, address = await self._resolve()
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            if config.path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(config.path)
                os.fchmod(listener.fileno(), 0o600)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
            if config.path is not None:
                status = os.stat(config.path)
                self._inode = (status.st_dev, status.st_ino)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"Failed to bind '{self.filename}': {error.strerror}") from error
        return listener

    async def _connect(self) -> None:
        if self._config.fd is not None:
            self._take(socket.socket(fileno=self._config.fd))
            return
        family, address = await self._resolve()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self._loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            text = f"Failed to connect to '{self.filename}': {error.strerror}"
            raise OSError(error.errno, text) from error
        self._take(sock)

    async def _resolve(self) -> tuple[socket.AddressFamily, Any]:
        """Where to bind or connect to; a host name is looked up on a thread."""
        config = self._config
        if config.path is not None:
            return socket.AF_UNIX, config.path
        host = (config.host or "").strip("[]") or "127.0.0.1"
        try:
            found = await self._loop.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            text = f"address resolution failed for {host}:{config.port}: {error.strerror}"
            raise OSError(error.errno, text) from error
        except UnicodeError:
            raise OSError(errno.EINVAL, f"'{host}' is not a host name") from None
        family, _, _, _, address = found[0]
        return family, address

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
        self._accept_more(False)  # the next client waits in the backlog, as with QEMU
        self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        if self._config.nodelay and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connect(SocketWire(sock))
        self._client_came.set()


def describe(config: ChardevConfig) -> str:
    """As query-chardev shows it."""
    suffix = ",server=on" if config.server else ""
    if config.path is not None:
        return f"unix:{config.path}{suffix}"
    if config.host is not None:
        return f"tcp:{config.host}:{config.port}{suffix}"
    return f"fd:{config.fd}{suffix}"
