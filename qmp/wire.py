"""What a QMP client comes over: a socket, which carries descriptors too, or a pair of pipes."""

from __future__ import annotations

import array
import os
import select
import socket
from typing import Final, Protocol

__all__ = ["PipeWire", "SocketWire", "Wire"]

_READ_BYTES: Final = 65536
_MAX_FDS: Final = 16
"""As QEMU's TCP_MAX_FDS."""


class Wire(Protocol):
    """A non-blocking, two-way channel."""

    @property
    def input_fd(self) -> int: ...
    @property
    def output_fd(self) -> int: ...

    def read(self) -> tuple[bytes, list[int]]:
        """Bytes and descriptors that came; no bytes is the end. BlockingIOError: nothing now."""

    def write(self, data: bytes | memoryview) -> int:
        """Send what fits. BlockingIOError: nothing fits now."""

    def close(self) -> None:
        """Close both directions."""


class SocketWire:
    """A connected stream socket; it is owned and closed."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._passes_fds = sock.family == socket.AF_UNIX
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def input_fd(self) -> int:
        return self._socket.fileno()

    @property
    def output_fd(self) -> int:
        return self._socket.fileno()

    def read(self) -> tuple[bytes, list[int]]:
        if not self._passes_fds:
            return self._socket.recv(_READ_BYTES), []
        space = socket.CMSG_SPACE(_MAX_FDS * 4)
        data, ancillary, _, _ = self._socket.recvmsg(_READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        return data, list(fds)

    def write(self, data: bytes | memoryview) -> int:
        return self._socket.send(data, socket.MSG_NOSIGNAL)

    def close(self) -> None:
        self._socket.close()


class PipeWire:
    """Two descriptors, such as standard input and output. They are borrowed and left open.

    They are made non-blocking; since that is a property of the open file, which others may share, closing
    the wire puts them back as they were.
    """

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self._input_fd, self._output_fd = input_fd, output_fd
        self._were_blocking = {fd: os.get_blocking(fd) for fd in (input_fd, output_fd)}
        for fd in self._were_blocking:
            os.set_blocking(fd, False)

    @property
    def input_fd(self) -> int:
        return self._input_fd

    @property
    def output_fd(self) -> int:
        return self._output_fd

    def read(self) -> tuple[bytes, list[int]]:
        return os.read(self._input_fd, _READ_BYTES), []

    def write(self, data: bytes | memoryview) -> int:
        return os.write(self._output_fd, data)

    def close(self) -> None:
        for fd, blocking in self._were_blocking.items():
            os.set_blocking(fd, blocking)


def is_pollable(fd: int) -> bool:
    """Whether epoll takes the descriptor. Regular files and /dev/null it does not, but those never block."""
    with select.epoll() as probe:
        try:
            probe.register(fd)
        except PermissionError:
            return False
    return True
