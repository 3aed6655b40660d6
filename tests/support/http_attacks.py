"""Requests that a gateway must refuse, as bytes on the wire, and a client that is as rude as they are."""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["WEBSOCKET", "attacks", "converse", "request", "status_of"]

WEBSOCKET: Final = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def request(line: str, host: str | None, *headers: str, body: bytes = b"") -> bytes:
    """A request: its first line without the version, `Host`, more headers."""
    hosts = [] if host is None else [f"Host: {host}"]
    return "\r\n".join([f"{line} HTTP/1.1", *hosts, *headers, "", ""]).encode("latin-1") + body


def attacks(own: str, token: str) -> dict[str, bytes]:
    """What each is about -> its bytes; `own` is the name and port that the server answers to."""
    port = own.rpartition(":")[2]
    good = f"Authorization: Bearer {token}"
    socket = (*WEBSOCKET, good)
    return {
        # Names (DNS rebinding)
        "evil host": request("GET /", "evil.example"),
        "evil host, our port": request("GET /status", f"evil.example:{port}"),
        "evil host on the socket": request("GET /qmp", f"evil.example:{port}", *socket),
        "host with our name in it": request("GET /", f"127.0.0.1.evil.example:{port}"),
        "host with user information": request("GET /", f"127.0.0.1:{port}@evil.example"),
        "host on another port": request("GET /", "127.0.0.1:1"),
        "host with a dot behind": request("GET /", f"localhost.:{port}"),
        "another loopback address": request("GET /", f"127.1.2.3:{port}"),
        "empty host": request("GET /", ""),
        "no host": request("GET /", None),
        "two hosts": request("GET /", own, "Host: evil.example"),
        "host in the target": request("GET http://evil.example/", own),
        "own host in the target": request(f"GET http://{own}/status", own),
        "forwarded host": request("GET /", "evil.example", f"X-Forwarded-Host: {own}"),
        # Other sites
        "null origin": request("GET /status", own, "Origin: null"),
        "evil origin": request("GET /status", own, "Origin: http://evil.example"),
        "evil origin on the socket": request("GET /qmp", own, *socket, "Origin: http://evil.example"),
        "null origin on the socket": request("GET /qmp", own, *socket, "Origin: null"),
        "origin of another port": request("GET /qmp", own, *socket, "Origin: http://127.0.0.1:1"),
        "two origins": request("GET /", own, f"Origin: http://{own}", "Origin: http://evil.example"),
        "another site's script": request(
            "GET /status/stream", own, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"
        ),
        "another port's frame": request("GET /", own, "Sec-Fetch-Site: same-site"),
        "preflight": request("OPTIONS /qmp", own, f"Origin: http://{own}"),
        # The token
        "socket without token": request("GET /qmp", own, *WEBSOCKET),
        "wrong token": request("GET /qmp", own, *WEBSOCKET, "Authorization: Bearer x"),
        "empty token": request("GET /qmp", own, *WEBSOCKET, "Authorization: Bearer "),
        "half a token": request("GET /qmp", own, *WEBSOCKET, f"Authorization: Bearer {token[:-1]}"),
        "token in the query": request(f"GET /qmp?token={token}&access_token={token}", own, *WEBSOCKET),
        "token in a cookie": request("GET /qmp", own, *WEBSOCKET, f"Cookie: token={token}"),
        "token as a subprotocol": request("GET /qmp", own, *WEBSOCKET, f"Sec-WebSocket-Protocol: {token}"),
        "basic authorization": request("GET /qmp", own, *WEBSOCKET, f"Authorization: Basic {token}"),
        "two authorizations": request("GET /qmp", own, *socket, "Authorization: Bearer x"),
        # Paths
        "parent folder": request("GET /../../etc/passwd", own),
        "encoded parent folder": request("GET /%2e%2e/%2e%2e/etc/passwd", own),
        "encoded slashes": request("GET /..%2f..%2fetc%2fpasswd", own),
        "double encoding": request("GET /%252e%252e%252fetc/passwd", own),
        "backslashes": request("GET /..\\..\\etc\\passwd", own),
        "overlong UTF-8": request("GET /%c0%ae%c0%ae/etc/passwd", own),
        "NUL in the path": request("GET /page.js%00.html", own),
        "our file by its name": request("GET /static/index.html", own),
        "a path that ends as one of ours": request("GET //qmp", own, *socket),
        "encoded path": request("GET /%71mp", own, *socket),
        "path in a schema": request("GET /schema/../__init__.py", own),
        "a schema that is none": request("GET /schema/__init__.py", own),
        # Methods and bodies
        "POST a command": request(
            "POST /qmp",
            own,
            good,
            "Content-Type: application/json",
            "Content-Length: 18",
            body=b'{"execute":"quit"}',
        ),
        "POST a form": request(
            "POST /", own, "Content-Type: application/x-www-form-urlencoded", "Content-Length: 3", body=b"a=b"
        ),
        "PUT": request("PUT /page.js", own, "Content-Length: 1", body=b"x"),
        "DELETE": request("DELETE /docs", own),
        "TRACE": request("TRACE /", own),
        "CONNECT": request("CONNECT evil.example:443", own),
        "unknown method": request("BREW /", own),
        "GET with a body": request(
            "GET /", own, "Content-Type: text/plain", "Content-Length: 5", body=b"hello"
        ),
        "GET with a huge body": request(
            "GET /", own, "Content-Type: application/json", "Content-Length: 99999999999"
        ),
        "expectation": request("GET /", own, "Content-Length: 5", "Expect: 100-continue"),
        # Smuggling
        "both lengths": request(
            "GET /",
            own,
            "Content-Length: 5",
            "Transfer-Encoding: chunked",
            body=b"0\r\n\r\nGET /qmp HTTP/1.1\r\n\r\n",
        ),
        "two lengths": request("GET /", own, "Content-Length: 0", "Content-Length: 30", body=b"x" * 30),
        "odd transfer encoding": request("GET /", own, "Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
        "negative length": request("GET /", own, "Content-Length: -1"),
        "length with a sign": request("GET /", own, "Content-Length: +0"),
        "space before the colon": request("GET /", own, "Transfer-Encoding : chunked"),
        "folded header": request("GET /", own, "X-A: b\r\n c: d"),
        "bare line feeds": f"GET / HTTP/1.1\nHost: {own}\n\n".encode(),
        "carriage return in a header": request("GET /", own, "X-A: b\rX-B: c"),
        "NUL in a header": request("GET /", own, "X-A: b\0c"),
        # Upgrades
        "upgrade elsewhere": request("GET /", own, *socket),
        "upgrade to HTTP/2": request("GET /", own, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"),
        "socket without upgrade": request("GET /qmp", own, good),
        "old WebSocket": request(
            "GET /qmp", own, *(h.replace("13", "8") if "Version" in h else h for h in socket)
        ),
        "WebSocket without a key": request("GET /qmp", own, *(h for h in socket if "Key" not in h)),
        "WebSocket with a short key": request(
            "GET /qmp", own, *(h if "Key" not in h else "Sec-WebSocket-Key: eA==" for h in socket)
        ),
        # Sizes and other protocols
        "long target": request(f"GET /{'x' * 10000}", own),
        "long header": request("GET /", own, f"X-A: {'x' * 10000}"),
        "many headers": request("GET /", own, *(f"X-{number}: y" for number in range(200))),
        "TLS": bytes.fromhex("16030100c5010000c1030300") + b"\0" * 190,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /\r\n\r\n",
        "HTTP/3.7": f"GET / HTTP/3.7\r\nHost: {own}\r\n\r\n".encode(),
        "QMP without HTTP": b'{"execute": "qmp_capabilities"}\r\n{"execute": "quit"}\r\n\r\n',
    }


async def converse(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes, timeout_s: float = 60.0
) -> bytes:
    """Send, then read until the server closes; raises TimeoutError if it does not."""
    reader, writer = streams
    try:
        async with asyncio.timeout(timeout_s):
            writer.write(data)
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    """The status of a response, 0 for none."""
    words = answer.split(b" ", 2)
    return int(words[1]) if answer.startswith(b"HTTP/") and len(words) > 1 else 0
