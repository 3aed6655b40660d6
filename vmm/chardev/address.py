"""A socket chardev's options as the address of a socket."""

from __future__ import annotations

from dataclasses import replace

from qmp.address import AddressKind, SocketAddress
from vmm.config import ChardevConfig

__all__ = ["socket_address"]


def socket_address(config: ChardevConfig, *, pretty: bool = False) -> SocketAddress:
    """Where it listens or connects to; `pretty` is for a monitor on it."""
    address = SocketAddress(
        AddressKind.TCP,
        host=(config.host or "").strip("[]"),
        port=config.port or 0,
        server=config.server,
        wait=config.wait,
        pretty=pretty,
        exclusive=config.exclusive,
        reconnect_s=config.reconnect_s,
    )
    if config.path is not None:
        return replace(address, kind=AddressKind.UNIX, path=config.path)
    if config.fd is not None:
        return replace(address, kind=AddressKind.FD, fd=config.fd)
    return address
