"""Where a monitor listens or connects to: `-qmp unix:P,server=on,wait=off` in the form of a value."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypedDict, Unpack

__all__ = ["AddressKind", "SocketAddress"]

UNIX_PATH_BYTES: Final = 107
"""sizeof(sockaddr_un.sun_path) less the NUL."""


class AddressKind(Enum):
    """How the socket is reached."""

    UNIX = "unix"
    TCP = "tcp"
    FD = "fd"


class _Options(TypedDict, total=False):
    server: bool
    wait: bool
    pretty: bool
    exclusive: bool
    reconnect_s: float


@dataclass(frozen=True)
class SocketAddress:
    """The address of one monitor, with the options that QEMU's socket chardev has.

    `server`: listen (True) or connect out. `wait`: a listening server's start waits for the first
    client. `pretty`: multi-line JSON. `fd` is an already listening (server) or connected socket.
    `exclusive`: a listening monitor serves one client at a time. `reconnect_s`: seconds between attempts
    to connect out for as long as nobody is at the other end; 0 is one attempt.
    """

    kind: AddressKind
    path: str = ""
    host: str = ""
    port: int = 0
    fd: int = -1
    server: bool = False
    wait: bool = True
    pretty: bool = False
    exclusive: bool = True
    reconnect_s: float = 0

    @classmethod
    def unix(cls, path: str, **options: Unpack[_Options]) -> SocketAddress:
        """A unix socket at a file system path; a listening one is created with mode 0600."""
        return cls(AddressKind.UNIX, path=path, **options)

    @classmethod
    def tcp(cls, host: str, port: int, **options: Unpack[_Options]) -> SocketAddress:
        """A TCP socket; an empty host means loopback, never every interface."""
        return cls(AddressKind.TCP, host=host, port=port, **options)

    @classmethod
    def from_fd(cls, fd: int, **options: Unpack[_Options]) -> SocketAddress:
        """An inherited socket; the monitor becomes its owner and closes it."""
        return cls(AddressKind.FD, fd=fd, **options)

    async def resolve(self) -> tuple[socket.AddressFamily, Any]:
        """The family and name to bind or connect to; a host name is looked up on a thread.

        Raises:
            OSError: the path is too long, or there is no such host.
        """
        if self.kind is AddressKind.UNIX:
            length = len(os.fsencode(self.path))
            if length > UNIX_PATH_BYTES:
                raise OSError(
                    f"UNIX socket path '{self.path}' is too long: {length} bytes, at most {UNIX_PATH_BYTES}"
                )
            return socket.AF_UNIX, self.path
        host, loop = self.host or "127.0.0.1", asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            text = f"address resolution failed for {host}:{self.port}: {error.strerror}"
            raise OSError(error.errno, text) from error
        except UnicodeError:
            raise OSError(errno.EINVAL, f"'{host}' is not a host name") from None
        family, _, _, _, name = found[0]
        return family, name

    def describe(self) -> str:
        """The text that query-chardev shows, such as `unix:/tmp/s,server=on`."""
        suffix = ",server=on" if self.server else ""
        if self.kind is AddressKind.UNIX:
            return f"unix:{self.path}{suffix}"
        if self.kind is AddressKind.TCP:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"tcp:{host}:{self.port}{suffix}"
        return f"fd:{self.fd}{suffix}"
