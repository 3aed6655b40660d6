"""~ Which requests are served: a request's head in, the path or a refusal out.

A web page that somebody has open in a browser on this machine must not reach us. It can send requests
anywhere, by any name that its own DNS server resolves to our address. So, in this order:

1. `Host` names us: a loopback name with our port, the address that was connected to, or a name that the owner
   allowed (DNS rebinding). Once, and there.
2. `Origin`, if there is one, is that of our own pages; `null` is not. A browser that says by `Sec-Fetch-Site`
   that another site asks gets nothing either, but a link to a page may be followed.
3. The path is one of a table, compared as it came: nothing is decoded, joined or looked up on a disk.
4. The method is one that the path has. No request has a body, so there is nothing to smuggle one in.
5. What can change anything needs the bearer token, in the header: a browser never adds that by itself.
6. An upgrade is one to WebSocket, version 13, and there only where QMP is.

Sources: RFC 9110 (7.2 Host, 15.5 status codes), RFC 9112 (3.2, 6), RFC 6455 (4.2.1), RFC 6750 (2.1), the
Fetch Metadata draft of the W3C.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Guard", "Refusal", "RequestHead", "Route"]

_LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_HTTP_PORT: Final = 80
_ONCE: Final = frozenset(
    {
        *("authorization", "content-length", "content-type", "expect", "host", "origin"),
        *("sec-fetch-mode", "sec-fetch-site", "sec-websocket-key", "sec-websocket-version"),
        *("transfer-encoding", "upgrade"),
    }
)
"""Headers that two parties could read differently if they came twice."""


class Refusal(Exception):
    """The request is not served; the text goes to the client."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        """`status` is the HTTP status, 400 to 499; `headers` belong to the response."""
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Route:
    """What may be asked of a path."""

    methods: tuple[str, ...] = ("GET", "HEAD")
    writes: bool = False
    """The token is needed."""
    websocket: bool = False


@dataclass(frozen=True)
class RequestHead:
    """A request up to its body. `target` is as it came; `own_host` and `own_port` name our end of the
    connection. On a unix socket `own_port` is None.
    """

    method: str
    target: str
    headers: Sequence[tuple[str, str]]
    own_host: str = ""
    own_port: int | None = None


@dataclass(frozen=True)
class Guard:
    """The rules with their figures filled in."""

    routes: Mapping[str, Route]
    token: str = field(repr=False)
    allowed_hosts: frozenset[str] = frozenset()
    """More values of `Host`, in lower case: a name for any port, or name:port."""

    def check(self, head: RequestHead) -> str:
        """The path of a request that is served.

        Raises:
            Refusal: any other request.
        """
        headers = _single_headers(head.headers)
        host = self._check_host(head, headers)
        self._check_origin(head, headers, host)
        path = head.target.partition("?")[0]
        route = self.routes.get(path)
        if route is None:
            raise Refusal(404, "There is nothing here.")
        if head.method not in route.methods:
            raise Refusal(405, "This path is only read.", {"Allow": ", ".join(route.methods)})
        _check_no_body(headers)
        if route.writes:
            self._check_token(headers)
        _check_upgrade(route, headers)
        return path

    def _check_host(self, head: RequestHead, headers: Mapping[str, str]) -> str:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if host and (host in self.allowed_hosts or name in self.allowed_hosts):
            return host
        if head.own_port is None:
            ours = {"localhost"}
        else:
            names = (*_LOOPBACK_NAMES, _literal(head.own_host))
            ours = {f"{each}:{head.own_port}" for each in names}
            if head.own_port == _HTTP_PORT:
                ours.update(names)
        if host not in ours:
            raise Refusal(421, "The Host header does not name this server.")
        return host

    @staticmethod
    def _check_origin(head: RequestHead, headers: Mapping[str, str], host: str) -> None:
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Refusal(403, "Requests of other sites are refused.")
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
        if headers.get("sec-fetch-mode") != "navigate" or head.method != "GET":
            raise Refusal(403, "Requests of other sites are refused.")

    def _check_token(self, headers: Mapping[str, str]) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.token.encode()):
            challenge = {"WWW-Authenticate": 'Bearer realm="pageferry"'}
            raise Refusal(401, "The header 'Authorization: Bearer TOKEN' is needed.", challenge)


def _single_headers(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by name in lower case."""
    found: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        if name in found and name in _ONCE:
            raise Refusal(400, f"The header '{name}' may come once.")
        found[name] = value.strip()
    return found


def _literal(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address


def _check_no_body(headers: Mapping[str, str]) -> None:
    if "expect" in headers:
        raise Refusal(417, "No request here has a body.")
    if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
        return
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "No request here has a body, and QMP is JSON.")
    raise Refusal(413, "No request here has a body: send QMP in WebSocket messages.")


def _check_upgrade(route: Route, headers: Mapping[str, str]) -> None:
    if not route.websocket:
        if "upgrade" in headers:
            raise Refusal(400, "This path speaks plain HTTP/1.1.")
        return
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in options:
        raise Refusal(426, "This path speaks WebSocket.", {"Upgrade": "websocket", "Connection": "Upgrade"})
    if headers.get("sec-websocket-version") != "13":
        raise Refusal(426, "The version of WebSocket here is 13.", {"Sec-WebSocket-Version": "13"})
