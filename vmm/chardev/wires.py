"""The ends of character backends: descriptors, stdio and sockets."""

from __future__ import annotations

import os
import select
import socket
import stat

__all__ = ["FdWire", "SocketWire", "open_file", "open_stdio"]

PIPE_SAFE_BYTES = 512
"""_POSIX_PIPE_BUF: a write of as much after POLLOUT does not block."""


class FdWire:
    """Descriptors that this object owns. `blocking_write`: ask poll first, write little."""

    def __init__(self, read_fd: int | None, write_fd: int | None, *, blocking_write: bool = False) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._blocking_write = blocking_write

    def read(self, n: int) -> bytes:
        assert self.read_fd is not None
        return os.read(self.read_fd, n)

    def write(self, data: bytes) -> int:
        assert self.write_fd is not None
        if not self._blocking_write:
            return os.write(self.write_fd, data)
        poll = select.poll()
        poll.register(self.write_fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(self.write_fd, data[:PIPE_SAFE_BYTES])

    def close(self) -> None:
        for fd in (self.read_fd, self.write_fd):
            if fd is not None:
                os.close(fd)


class SocketWire:
    """A connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.read_fd: int | None = sock.fileno()
        self.write_fd: int | None = sock.fileno()

    def read(self, n: int) -> bytes:
        return self._sock.recv(n)

    def write(self, data: bytes) -> int:
        return self._sock.send(data)

    def close(self) -> None:
        self._sock.close()


def open_file(path: str, *, append: bool) -> FdWire:
    """A file to write to, created if need be. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    return FdWire(None, os.open(path, flags | (os.O_APPEND if append else os.O_TRUNC), 0o666))


def open_stdio() -> FdWire:
    """stdin and stdout.

    O_NONBLOCK belongs to what the shell and others share with us, so it is not set there: a terminal or pipe
    is opened anew, and where that is not allowed poll is asked before each write.
    """
    mode = os.fstat(1).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        try:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return FdWire(os.dup(0), os.open("/proc/self/fd/1", flags))
        except OSError:
            pass
    return FdWire(os.dup(0), os.dup(1), blocking_write=not stat.S_ISREG(mode))
