"""Migration URIs -> addresses; nothing is opened, resolved or looked up here.

    tcp:HOST:PORT[,ipv4=on|off][,ipv6=on|off]   HOST may be empty (any) or [IPv6]
    unix:PATH                                   all of it is the path
    fd:NAME                                     of a getfd descriptor, or the number of an inherited one
    exec:COMMAND                                for the shell
    file:PATH[,offset=N]                        N with QEMU's suffixes (k, M, G) or 0x; since QEMU 8.2

Error texts are QEMU 7.2's (util/qemu-sockets.c, migration/migration.c), file: as in 8.2's migration/file.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vmm.migration.errors import MigrationRefused
from vmm.migration.status import Role

__all__ = [
    "Address",
    "ExecAddress",
    "FdAddress",
    "FileAddress",
    "TcpAddress",
    "UnixAddress",
    "parse_uri",
]

UNIX_PATH_MAX_BYTES: Final = 107
"""sockaddr_un.sun_path has 108 bytes, one of them for the NUL."""


@dataclass(frozen=True)
class TcpAddress:
    """`ipv4` and `ipv6` are None where nothing was said."""

    host: str
    port: str
    """A number, or a service name to be resolved with the host."""
    ipv4: bool | None = None
    ipv6: bool | None = None


@dataclass(frozen=True)
class UnixAddress:
    """A UNIX socket's path, short enough to be one."""

    path: str


@dataclass(frozen=True)
class FdAddress:
    """A descriptor that this process has already."""

    name: str

    @property
    def number(self) -> int | None:
        """The descriptor's number if it is given by number, else None."""
        return int(self.name) if re.fullmatch(r"[0-9]{1,9}", self.name) else None


@dataclass(frozen=True)
class ExecAddress:
    """A shell command that reads or writes the stream."""

    command: str


@dataclass(frozen=True)
class FileAddress:
    """A file, and a place in it."""

    path: str
    offset: int = 0
    """Where in the file the stream begins, in bytes."""


Address = TcpAddress | UnixAddress | FdAddress | ExecAddress | FileAddress

_NO_TRANSPORT: Final = ("rdma", "vsock")


def parse_uri(uri: str, role: Role) -> Address:
    """The address that `uri` means; raises MigrationRefused with QEMU's text for this role."""
    scheme, colon, rest = uri.partition(":")
    if "\0" in uri:
        raise MigrationRefused("A migration URI cannot contain a NUL character")
    if colon:
        match scheme:
            case "tcp":
                return _tcp(rest)
            case "unix":
                return _unix(rest)
            case "fd":
                if not rest:
                    raise MigrationRefused("File descriptor named '' has not been found")
                return FdAddress(rest)
            case "exec":
                if not rest.strip():
                    raise MigrationRefused("exec: expects a command, as in exec:cat>FILE")
                return ExecAddress(rest)
            case "file":
                return _file(rest)
    if role is Role.DESTINATION:
        raise MigrationRefused(f"unknown migration protocol: {uri}")
    raise MigrationRefused("Parameter 'uri' expects a valid migration protocol")


def _tcp(text: str) -> TcpAddress:
    if text.startswith(":"):
        host, rest, what = "", text[1:], "port in address"
    elif text.startswith("["):
        match = re.match(r"\[([^\]]{1,64})\]:(.*)", text, re.DOTALL)
        if match is None:
            raise MigrationRefused(f"error parsing IPv6 address '{text}'")
        host, rest, what = match[1], match[2], "IPv6 address"
    else:
        host, _, rest = text.partition(":")
        what = "address"
        if len(host) > 255:
            raise MigrationRefused(f"host name is too long: {len(host)} characters, must be less than 256")
    port, *options = rest.split(",")
    if not port or len(port) > 32:
        raise MigrationRefused(f"error parsing {what} '{text}'")
    if re.fullmatch(r"-?[0-9]+", port) and not 0 <= int(port) <= 65535:
        raise MigrationRefused(f"error parsing {what} '{text}': port {port} is not between 0 and 65535")
    flags: dict[str, bool | None] = {"ipv4": None, "ipv6": None}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in flags:
            raise MigrationRefused(f"Unknown option '{name}' in address '{text}', expected ipv4 or ipv6")
        if (equals and value not in ("on", "off")) or (value == "" and equals):
            raise MigrationRefused(f"error parsing '{name}' flag '={value}'")
        flags[name] = value != "off"
    return TcpAddress(host, port, flags["ipv4"], flags["ipv6"])


def _unix(path: str) -> UnixAddress:
    if not path:
        raise MigrationRefused("invalid Unix socket address")
    length = len(path.encode("utf-8", "surrogateescape"))
    if length > UNIX_PATH_MAX_BYTES:
        raise MigrationRefused(
            f"UNIX socket path '{path}' is too long: {length} bytes, "
            f"must be less than {UNIX_PATH_MAX_BYTES + 1} bytes"
        )
    return UnixAddress(path)


_SIZE: Final = re.compile(r"(0x[0-9a-f]{1,16}|[0-9]{1,19})([bkmgtpe]?)", re.IGNORECASE)


def _file(text: str) -> FileAddress:
    path, found, offset_text = text.rpartition(",offset=")
    if not found:
        path, offset_text = text, "0"
    if not path:
        raise MigrationRefused("file: expects a path, as in file:/tmp/vm.state")
    match = _SIZE.fullmatch(offset_text)
    if match is None:
        raise MigrationRefused(f"file URI has bad offset '{offset_text}'")
    # A hexadecimal number takes no suffix: its last digit may be b or e.
    scale = 1 << 10 * "bkmgtpe".index(match[2].lower() or "b")
    offset = int(match[1], 0 if match[1][:2].lower() == "0x" else 10) * scale
    if offset >= 1 << 63:
        raise MigrationRefused(f"file URI has bad offset '{offset_text}'")
    return FileAddress(path, offset)
