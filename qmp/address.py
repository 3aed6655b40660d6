"""Where a monitor listens or connects to: `-qmp unix:P,server=on,wait=off` in the form of a value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["AddressKind", "SocketAddress"]


class AddressKind(Enum):
    """How the socket is reached."""

    UNIX = "unix"
    TCP = "tcp"
    FD = "fd"


@dataclass(frozen=True)
class SocketAddress:
    """The address of one monitor, with the options that QEMU's socket chardev has.

    `server`: listen (True) or connect out. `wait`: a listening server's start waits for the first
    client. `pretty`: multi-line JSON. `fd` is an already listening (server) or connected socket.
    """

    kind: AddressKind
    path: str = ""
    host: str = ""
    port: int = 0
    fd: int = -1
    server: bool = False
    wait: bool = True
    pretty: bool = False

    @classmethod
    def unix(
        cls, path: str, *, server: bool = False, wait: bool = True, pretty: bool = False
    ) -> SocketAddress:
        """A unix socket at a file system path; a listening one is created with mode 0600."""
        return cls(AddressKind.UNIX, path=path, server=server, wait=wait, pretty=pretty)

    @classmethod
    def tcp(
        cls, host: str, port: int, *, server: bool = False, wait: bool = True, pretty: bool = False
    ) -> SocketAddress:
        """A TCP socket; an empty host means loopback, never every interface."""
        return cls(AddressKind.TCP, host=host, port=port, server=server, wait=wait, pretty=pretty)

    @classmethod
    def from_fd(
        cls, fd: int, *, server: bool = False, wait: bool = True, pretty: bool = False
    ) -> SocketAddress:
        """An inherited socket; the monitor becomes its owner and closes it."""
        return cls(AddressKind.FD, fd=fd, server=server, wait=wait, pretty=pretty)

    def describe(self) -> str:
        """The text that query-chardev shows, such as `unix:/tmp/s,server=on`."""
        suffix = ",server=on" if self.server else ""
        if self.kind is AddressKind.UNIX:
            return f"unix:{self.path}{suffix}"
        if self.kind is AddressKind.TCP:
            return f"tcp:{self.host}:{self.port}{suffix}"
        return f"fd:{self.fd}{suffix}"
