"""tcp: and unix: channels: who connects, who listens, and how the kernel notices that a peer is gone.

Sources: QEMU 7.2 migration/socket.c, util/qemu-sockets.c (texts); tcp(7) for the time limits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable

from vmm.errors import MigrationError
from vmm.migration.channel_types import Channel, Incoming, Patience
from vmm.migration.lobby import Lobby
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.resolve import AddressInfo, resolve
from vmm.migration.uri import TcpAddress, UnixAddress

__all__ = ["connect_socket", "listen_socket"]

BACKLOG = 128
"""Sources that come while another one is served wait in the kernel; arbitrary."""

PROBES = 3
"""Keepalive probes without an answer before a silent TCP peer is given up."""


def _channel(connected: socket.socket, name: str, peer_timeout_ms: int) -> Channel:
    connected.setblocking(False)
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_silence(connected, peer_timeout_ms)
    fd = connected.detach()
    return Channel(fd, fd, True, name)


def _notice_silence(connected: socket.socket, peer_timeout_ms: int) -> None:
    """Have the kernel break a connection whose host is gone: bytes not acknowledged, or none to send."""
    if not peer_timeout_ms:
        return
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, peer_timeout_ms)
    step_s = max(1, peer_timeout_ms // 1000 // (PROBES + 1))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, step_s),
        (socket.TCP_KEEPINTVL, step_s),
        (socket.TCP_KEEPCNT, PROBES),
    ):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


# ---- the source ----


def connect_socket(address: TcpAddress | UnixAddress, cancel_fd: int, peer_timeout_ms: int) -> Channel:
    """Raises OSError, MigrationError, Cancelled."""
    if isinstance(address, UnixAddress):
        connected = _connect_one(socket.AF_UNIX, address.path, f"'{address.path}'", cancel_fd)
        return _channel(connected, f"'{address.path}'", peer_timeout_ms)
    name = f"'{address.host}:{address.port}'"
    last: OSError | None = None
    for family, _, _, _, socket_address in _resolve(address, address.host or None, cancel_fd):
        try:
            connected = _connect_one(family, socket_address, name, cancel_fd)
        except OSError as error:
            last = error
        else:
            return _channel(connected, name, peer_timeout_ms)
    assert last is not None, "getaddrinfo gives at least one address"
    raise last


def _family(address: TcpAddress) -> int:
    """What `ipv4=` and `ipv6=` leave: one family, or either."""
    if (address.ipv4 and not address.ipv6) or address.ipv6 is False:
        return socket.AF_INET
    if (address.ipv6 and not address.ipv4) or address.ipv4 is False:
        return socket.AF_INET6
    return socket.AF_UNSPEC


def _resolve(address: TcpAddress, host: str | None, cancel_fd: int = -1) -> AddressInfo:
    try:
        return resolve(host, address.port, _family(address), cancel_fd)
    except (OSError, UnicodeError) as error:  # a label of more than 63 characters is the latter
        why = error.strerror if isinstance(error, OSError) else error
        text = f"address resolution failed for {host or ''}:{address.port}: {why}"
        raise MigrationError(text) from error


def _connect_one(family: int, address: object, name: str, cancel_fd: int) -> socket.socket:
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
        return sock


# ---- the destination ----


def listen_socket(address: TcpAddress | UnixAddress, patience: Callable[[], Patience]) -> Incoming:
    """Raises OSError, MigrationError."""
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
    lobby = Lobby(listener, lambda: patience().handshake_ms)

    def accept(cancel_fd: int) -> Channel:
        return _channel(lobby.admit(cancel_fd), name, patience().peer_ms)

    def second(cancel_fd: int, first: Channel) -> Channel:
        return _channel(lobby.admit_next(cancel_fd, first.read_fd), name, patience().peer_ms)

    def close() -> None:
        lobby.close()
        if isinstance(address, UnixAddress):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)

    return Incoming(name, accept, close, again=True, address=shown, second=second)


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
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
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"Failed to bind socket to {host}:{port}: {error.strerror}") from error
    return listener
