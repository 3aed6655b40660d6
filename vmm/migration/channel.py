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

import os
import stat
from collections.abc import Callable

from vmm.migration.channel_files import new_file, old_file, spawn
from vmm.migration.channel_sockets import connect_socket, listen_socket
from vmm.migration.channel_types import Channel, Incoming, Patience, TakeFd
from vmm.migration.uri import Address, ExecAddress, FdAddress, FileAddress, TcpAddress, UnixAddress

__all__ = ["Channel", "Incoming", "Patience", "TakeFd", "connect", "is_immediate", "listen"]


def is_immediate(address: Address) -> bool:
    """Does `connect` return at once, so that its error can be the reply to the command?"""
    return not isinstance(address, TcpAddress | UnixAddress)


def connect(address: Address, take_fd: TakeFd, cancel_fd: int, peer_timeout_ms: int = 0) -> Channel:
    """The source's side at `address`.

    Raises:
        OSError, MigrationError: there is nobody, or the file or command cannot be opened; says to what.
        Cancelled: the cancel eventfd became readable.
    """
    match address:
        case TcpAddress() | UnixAddress():
            return connect_socket(address, cancel_fd, peer_timeout_ms)
        case FdAddress(name):
            return _from_fd(take_fd(name))
        case ExecAddress(command):
            return spawn(command, for_write=True)
        case FileAddress(path, offset):
            return new_file(path, offset)


def listen(
    address: Address, take_fd: TakeFd, patience: Callable[[], Patience] = lambda: Patience()
) -> Incoming:
    """Open the destination's side at `address`. `patience` is asked at each connection.

    Raises:
        OSError, MigrationError: the address is in use, no such file, no such descriptor.
    """
    match address:
        case TcpAddress() | UnixAddress():
            return listen_socket(address, patience)
        case FdAddress(name):
            channel = _from_fd(take_fd(name))
        case ExecAddress(command):
            channel = spawn(command, for_write=False)
        case FileAddress(path, offset):
            channel = old_file(path, offset)
    return Incoming(channel.name, lambda _cancel_fd: channel, lambda: None, again=False)


def _from_fd(fd: int) -> Channel:
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return Channel(fd, fd, stat.S_ISSOCK(os.fstat(fd).st_mode), f"fd {fd}")
