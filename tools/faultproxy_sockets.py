"""The sockets of a fault proxy: tcp: and unix:, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from typing import Any

from tools.faultproxy_rules import RuleError
from vmm.migration.status import Role
from vmm.migration.uri import TcpAddress, UnixAddress, parse_uri

__all__ = [
    "CHUNK_BYTES",
    "Address",
    "arm_reset",
    "close_with_reset",
    "connected_socket",
    "drain",
    "listening_socket",
    "to_address",
]

CHUNK_BYTES = 1 << 16

Address = TcpAddress | UnixAddress


def to_address(uri: str) -> Address:
    """Raises PageferryError for what is no URI, RuleError for one of another kind."""
    address = parse_uri(uri, Role.SOURCE)
    if not isinstance(address, TcpAddress | UnixAddress):
        raise RuleError(f"expected tcp:HOST:PORT or unix:PATH, got '{uri}'")
    return address


def listening_socket(address: Address) -> socket.socket:
    """A socket that listens, in place of one that somebody left behind at the path. Raises OSError."""
    if isinstance(address, UnixAddress):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(address.path).st_mode):
                os.unlink(address.path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(address.path)
            listener.listen()
        except OSError:
            listener.close()
            raise
    else:
        host = address.host or "127.0.0.1"
        family = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, int(address.port)), family=family)
    listener.setblocking(False)
    return listener


async def connected_socket(address: Address) -> socket.socket:
    """A connection to a server. Raises OSError."""
    loop = asyncio.get_running_loop()
    where: Any = None
    if isinstance(address, UnixAddress):
        family, where = socket.AF_UNIX, address.path
    else:
        found = await loop.getaddrinfo(address.host or "127.0.0.1", address.port, type=socket.SOCK_STREAM)
        family, where = found[0][0], found[0][4]
    connected = socket.socket(family, socket.SOCK_STREAM)
    connected.setblocking(False)
    try:
        await loop.sock_connect(connected, where)
        if not isinstance(address, UnixAddress):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connected.close()
        raise
    return connected


async def drain(connected: socket.socket) -> None:
    """Take what the other side sends until it ends."""
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(connected, CHUNK_BYTES):
            pass


def close_with_reset(connected: socket.socket) -> None:
    """Close it with a reset."""
    arm_reset(connected)
    connected.close()


def arm_reset(connected: socket.socket) -> None:
    """What closes it later then sends a reset, and forgets what was still to be sent. Raises OSError."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
