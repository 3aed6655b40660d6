"""Opens the sockets of a `SocketAddress`, and removes the files of those that listened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Final

from qmp.address import AddressKind, SocketAddress

__all__ = ["OwnFile", "open_connection", "open_listener"]

_BACKLOG: Final = 128


async def open_listener(address: SocketAddress, backlog: int = _BACKLOG) -> socket.socket:
    """A non-blocking listening socket; a unix one is for its owner alone and replaces what is at its path.

    Raises:
        OSError: the address is in use, too long or not ours.
    """
    if address.kind is AddressKind.FD:
        listener = socket.socket(fileno=address.fd)
        listener.setblocking(False)
        return listener
    family, name = await address.resolve()
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        if family == socket.AF_UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)
            # The file takes the mode of the socket: there is no moment at which others could connect.
            os.fchmod(listener.fileno(), 0o600)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(name)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise _explain(error, f"Failed to bind '{address.describe()}'") from error
    return listener


async def open_connection(address: SocketAddress) -> socket.socket:
    """A socket that is connected to whoever listens there; or the connected descriptor.

    Raises:
        OSError: nobody listens there.
    """
    if address.kind is AddressKind.FD:
        return socket.socket(fileno=address.fd)
    family, name = await address.resolve()
    connected = socket.socket(family, socket.SOCK_STREAM)
    connected.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connected, name)
    except BaseException as error:
        connected.close()
        if isinstance(error, OSError):
            raise _explain(error, f"Failed to connect to '{address.describe()}'") from error
        raise
    return connected


@dataclass(frozen=True)
class OwnFile:
    """A file that we have made, to be removed by us alone."""

    path: str
    device: int
    inode: int

    @classmethod
    def at(cls, path: str) -> OwnFile:
        """The one that is there now. Raises OSError."""
        status = os.stat(path)
        return cls(path, status.st_dev, status.st_ino)

    def unlink(self) -> None:
        """Remove it, unless it is gone or somebody has put another in its place."""
        with contextlib.suppress(OSError):
            if OwnFile.at(self.path) == self:
                os.unlink(self.path)


def _explain(error: OSError, what: str) -> OSError:
    return OSError(error.errno, f"{what}: {error.strerror or error}")
