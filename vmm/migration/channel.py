"""Channels: a connected byte stream for each URI scheme, on the source's side and on the destination's.

    scheme   source                                destination                      two-way
    tcp:     connects                              listens, one peer at a time      yes
    unix:    connects                              listens, one peer at a time      yes
    fd:      a descriptor passed in                a descriptor passed in           if it is a socket
    exec:    the standard input of `sh -c`         the standard output of `sh -c`   no
    file:    a new file, renamed when complete     the file                         no

Every descriptor is CLOEXEC and non-blocking; every wait ends when the cancel eventfd becomes readable.
Sources: QEMU 7.2 migration/{socket,fd,exec}.c, newer ones migration/file.c; docs/devel/migration.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmm.errors import MigrationError
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.uri import Address, ExecAddress, FdAddress, FileAddress, TcpAddress, UnixAddress

__all__ = ["Channel", "Incoming", "TakeFd", "connect", "is_immediate", "listen"]

TakeFd = Callable[[str], int]
"""Gives the descriptor that a client has passed under a name; raises MigrationError if there is none."""


def _nothing() -> None:
    pass


@dataclass
class Channel:
    """A connected byte stream; `read_fd` and `write_fd` are one descriptor where it is two-way.

    `finish` makes the data durable (waits for the command, renames the file) and raises MigrationError or
    OSError if that fails; `abort` undoes what is half done. `close` ends the channel and may be called twice.
    """

    read_fd: int
    write_fd: int
    two_way: bool
    name: str
    finish: Callable[[], None] = _nothing
    abort: Callable[[], None] = _nothing
    _closed: bool = field(default=False, repr=False)

    def shutdown(self) -> None:
        """Wake every thread that waits on this channel; it stays open, so that no descriptor is reused."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.write_fd)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptors. Nobody may be inside a call on them any more."""
        if self._closed:
            return
        self._closed = True
        for fd in {self.read_fd, self.write_fd} - {-1}:
            os.close(fd)


def is_immediate(address: Address) -> bool:
    """Does `connect` return at once, so that its error can be the reply to the command?"""
    return not isinstance(address, TcpAddress | UnixAddress)


def connect(address: Address, take_fd: TakeFd, cancel_fd: int) -> Channel:
    """The source's side at `address`.

    Raises:
        OSError, MigrationError: there is nobody, or the file or command cannot be opened; says to what.
        Cancelled: the cancel eventfd became readable.
    """
    match address:
        case TcpAddress() | UnixAddress():
            return _connect_socket(address, cancel_fd)
        case FdAddress(name):
            return _from_fd(take_fd(name))
        case ExecAddress(command):
            return _spawn(command, for_write=True)
        case FileAddress(path, offset):
            return _new_file(path, offset)


def _socket_channel(connected: socket.socket, name: str) -> Channel:
    connected.setblocking(False)
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fd = connected.detach()
    return Channel(fd, fd, True, name)


def _connect_socket(address: TcpAddress | UnixAddress, cancel_fd: int) -> Channel:
    if isinstance(address, UnixAddress):
        return _connect_one(socket.AF_UNIX, address.path, f"'{address.path}'", cancel_fd)
    name = f"'{address.host}:{address.port}'"
    last: OSError | None = None
    for family, _, _, _, socket_address in _resolve(address, address.host or None):
        try:
            return _connect_one(family, socket_address, name, cancel_fd)
        except OSError as error:
            last = error
    assert last is not None, "getaddrinfo gives at least one address"
    raise last


def _family(address: TcpAddress) -> int:
    """What `ipv4=` and `ipv6=` leave: one family, or either."""
    if (address.ipv4 and not address.ipv6) or address.ipv6 is False:
        return socket.AF_INET
    if (address.ipv6 and not address.ipv4) or address.ipv4 is False:
        return socket.AF_INET6
    return socket.AF_UNSPEC


def _resolve(address: TcpAddress, host: str | None) -> list[tuple[int, int, int, str, Any]]:
    try:
        return list(socket.getaddrinfo(host, address.port, _family(address), socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:  # a label of more than 63 characters is the latter
        why = error.strerror if isinstance(error, OSError) else error
        text = f"address resolution failed for {host or ''}:{address.port}: {why}"
        raise MigrationError(text) from error


def _connect_one(family: int, address: object, name: str, cancel_fd: int) -> Channel:
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        error = sock.connect_ex(address)  # type: ignore[arg-type]  # the address fits the family
        if error == errno.EINPROGRESS:
            wait_fd(sock.fileno(), cancel_fd, for_write=True)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, f"Failed to connect to {name}: {os.strerror(error)}")
        undo.pop_all()
        return _socket_channel(sock, name)


def _from_fd(fd: int) -> Channel:
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return Channel(fd, fd, stat.S_ISSOCK(os.fstat(fd).st_mode), f"fd {fd}")


def _spawn(command: str, *, for_write: bool) -> Channel:
    ours, theirs = os.pipe2(os.O_CLOEXEC)[:: -1 if for_write else 1]
    try:
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=theirs if for_write else subprocess.DEVNULL,
            stdout=None if for_write else theirs,
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    os.set_blocking(ours, False)
    name = f"command '{command}'"
    channel = Channel(-1 if for_write else ours, ours if for_write else -1, False, name)

    def finish() -> None:
        channel.close()
        status = child.wait()
        if status:
            raise MigrationError(f"The {name} ended with status {status}")

    def abort() -> None:
        channel.close()
        child.kill()
        child.wait()

    channel.finish, channel.abort = finish, abort
    return channel


def _new_file(path: str, offset: int) -> Channel:
    """With an offset the file is the user's, written in place as newer QEMU does; else it appears whole.

    What is there and is no file, a device such as /dev/null or a FIFO, is written to and never replaced.
    """
    path = os.path.realpath(path)
    special = os.path.exists(path) and not os.path.isfile(path)
    if offset or special:
        fd = _open_at(path, os.O_WRONLY | os.O_CREAT, offset)
        return Channel(-1, fd, False, f"file '{path}'", finish=_nothing if special else lambda: os.fsync(fd))
    partial = f"{path}.part-{os.getpid()}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def finish() -> None:
        os.fsync(fd)
        os.rename(partial, path)

    def abort() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)

    return Channel(-1, fd, False, f"file '{path}'", finish=finish, abort=abort)


def _open_at(path: str, flags: int, offset: int) -> int:
    """Never waits: a FIFO without a peer would keep the QMP command for ever."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd


@dataclass
class Incoming:
    """The destination's side of a URI, open for a source: `accept` gives its channel."""

    name: str
    accept: Callable[[int], Channel]
    """Waits for a source; the argument is the cancel eventfd. Raises Cancelled."""
    close: Callable[[], None]
    again: bool
    """May `accept` be called again after a failed attempt?"""
    address: dict[str, object] | None = None
    """For query-migrate's `socket-address`."""


def listen(address: Address, take_fd: TakeFd) -> Incoming:
    """Open the destination's side at `address`.

    Raises:
        OSError, MigrationError: the address is in use, no such file, no such descriptor.
    """
    match address:
        case TcpAddress() | UnixAddress():
            return _listen_socket(address)
        case FdAddress(name):
            channel = _from_fd(take_fd(name))
        case ExecAddress(command):
            channel = _spawn(command, for_write=False)
        case FileAddress(path, offset):
            channel = Channel(_open_at(path, os.O_RDONLY, offset), -1, False, f"file '{path}'")
    return Incoming(channel.name, lambda _cancel_fd: channel, _nothing, again=False)


def _listen_socket(address: TcpAddress | UnixAddress) -> Incoming:
    if isinstance(address, UnixAddress):
        listener = _listen_unix(address.path)
        name = f"'{address.path}'"
        shown: dict[str, object] = {"type": "unix", "path": address.path}
    else:
        listener = _listen_tcp(address)
        host, port = listener.getsockname()[:2]
        name = f"'{host}:{port}'"
        shown = {"type": "inet", "host": host, "port": str(port)}
        shown |= {"ipv6": True} if listener.family == socket.AF_INET6 else {"ipv4": True}
    listener.setblocking(False)

    def accept(cancel_fd: int) -> Channel:
        while True:
            wait_fd(listener.fileno(), cancel_fd)
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                return _socket_channel(listener.accept()[0], name)

    def close() -> None:
        listener.close()
        if isinstance(address, UnixAddress):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)

    return Incoming(name, accept, close, again=True, address=shown)


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"Failed to bind socket to {path}: {error.strerror}") from error
    return listener


def _listen_tcp(address: TcpAddress) -> socket.socket:
    host, port = address.host or "0.0.0.0", address.port
    family, kind, protocol, _, socket_address = _resolve(address, host)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(socket_address)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"Failed to bind socket to {host}:{port}: {error.strerror}") from error
    return listener
