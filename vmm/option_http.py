"""-http: where the HTTP side listens, and whom it may serve.

    -http 127.0.0.1:8080    -http unix:/run/vm.http,token=/etc/vm.token    -http 192.0.2.1:80,public=on

An address is a number or `localhost`, so that no name server decides whom we listen to; one that others can
reach has to be asked for with public=on.
"""

from __future__ import annotations

import ipaddress

from vmm.config import HttpConfig
from vmm.errors import OptionError
from vmm.option_syntax import parse_keys
from vmm.option_table import OPTIONS

__all__ = ["parse_http"]

UNIX_PATH_BYTES = 107
"""What fits into sockaddr_un.sun_path with its NUL."""


def parse_http(text: str, shown: str) -> HttpConfig:
    """The value of -http; `shown` is the option for messages. Raises OptionError."""
    option = OPTIONS["http"]
    values = parse_keys(text, option.implied, option.keys)
    address = str(values.get("address", ""))
    host, port, path = "", 0, None
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        length = len(path.encode("utf-8", "surrogateescape"))
        if not 0 < length <= UNIX_PATH_BYTES:
            raise OptionError(
                f"UNIX socket path '{path}' has {length} bytes, expected 1 to {UNIX_PATH_BYTES}"
            )
    else:
        host, port = _tcp(address, is_public=bool(values.get("public", False)))
    names = str(values.get("hosts", "")).lower().split("/")
    return HttpConfig(
        option=shown,
        host=host,
        port=port,
        path=path,
        token_path=None if "token" not in values else str(values["token"]),
        allowed_hosts=frozenset(name for name in names if name),
    )


def _tcp(address: str, *, is_public: bool) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise OptionError(f"Error parsing address '{address}': expected HOST:PORT or unix:PATH")
    host = host.removeprefix("[").removesuffix("]")
    if host in ("", "localhost"):
        host = "127.0.0.1"
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        raise OptionError(f"Expected an IP address or localhost, got '{host}'") from None
    if not (parsed.is_loopback or is_public):
        raise OptionError(f"Others can reach the address {host}: use 127.0.0.1, or add public=on")
    return host, int(port)
