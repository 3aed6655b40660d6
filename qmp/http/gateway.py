"""The HTTP server: an explicit table of paths, a guard before them, and bounds on whoever is slow.

    gateway = Gateway(dispatcher, hub, token=..., pages={"/": Page("text/html", render)}, feeds={"/f": feed})
    gateway.serve(listener)                # a listening socket; ours from now on
    gateway.release()                      # if held: QMP commands are executed from now on
    await gateway.close()

Paths of its own: `/qmp` (WebSocket, token), `/schema`, `/schema/query-qmp-schema`, `/schema/FILE.json`,
`/docs` and `/docs.css`. There is no directory: what is served is in memory, by its whole path. Every response
carries the same strict headers. No handler waits for anything but its own client.

Bounds: 64 connections, 16 of them WebSockets and 16 watching feeds; a request's head must be there within
15 s, in lines of at most 8 KiB; no request has a body; a client that takes nothing for `STALL_S` is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib import resources
from typing import Any, Final

from aiohttp import web

from qmp.dispatcher import Dispatcher
from qmp.events import EventHub
from qmp.http.feed import Feed
from qmp.http.guard import Guard, Refusal, RequestHead, Route
from qmp.http.reference import reference_html
from qmp.http.websocket import STALL_S, WebSocketClient, new_socket
from qmp.introspect import introspection_text
from qmp.json_text import dump_json

__all__ = ["Gateway", "Page"]

_log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
MAX_CLIENTS: Final = 16
MAX_WATCHERS: Final = 16
_IDLE_S: Final = 15.0
_CLOSE_S: Final = 0.1
_MAX_LINE_BYTES: Final = 8190
_MAX_HEADERS: Final = 64

HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "pageferry",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every response."""


@dataclass(frozen=True)
class Page:
    """Something to read: made anew at each request, at once."""

    content_type: str
    render: Callable[[], str | bytes]


class Gateway:
    """All of one process's HTTP. Every method is called on the loop's thread."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        hub: EventHub,
        *,
        token: str,
        pages: Mapping[str, Page],
        feeds: Mapping[str, Feed],
        allowed_hosts: frozenset[str] = frozenset(),
        held: bool = False,
    ) -> None:
        """`allowed_hosts`: see `guard`. `held`: QMP clients are greeted, but their commands wait."""
        self._dispatcher = dispatcher
        self._hub = hub
        self._held = held
        self._pages = {**_vocabulary_pages(dispatcher), **pages}
        self._feeds = dict(feeds)
        routes = dict.fromkeys(self._pages, Route())
        routes |= dict.fromkeys(self._feeds, Route(("GET",)))
        routes["/qmp"] = Route(("GET",), writes=True, websocket=True)
        self._guard = Guard(routes, token, allowed_hosts)
        self._protocols = _Protocols(self._handle)
        self._servers: list[asyncio.Server] = []
        self._clients: set[WebSocketClient] = set()
        self.request_count = 0
        """Requests whose head could be read."""
        self.refused_count = 0
        """Those of them that were refused."""

    @property
    def client_count(self) -> int:
        """How many QMP clients are connected."""
        return len(self._clients)

    async def serve(self, listener: socket.socket) -> None:
        """Serve whoever connects to a listening socket, which is closed at the end."""
        loop = asyncio.get_running_loop()
        if listener.family == socket.AF_UNIX:
            self._servers.append(await loop.create_unix_server(self._protocols.make, sock=listener))
        else:
            self._servers.append(await loop.create_server(self._protocols.make, sock=listener))

    def release(self) -> None:
        """From now on QMP commands are executed."""
        self._held = False
        for client in list(self._clients):
            client.release()

    async def close(self, flush_s: float = 1.0) -> None:
        """Stop listening, send QMP clients what they are owed for at most `flush_s` seconds, disconnect."""
        for server in self._servers:
            server.close()
        await asyncio.gather(*(client.close(flush_s) for client in list(self._clients)))
        await self._protocols.close()

    # Section: requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.request_count += 1
        try:
            path = self._guard.check(_head(request))
            if path == "/qmp":
                return await self._serve_client(request)
            if path in self._feeds:
                return await self._serve_watcher(request, self._feeds[path])
        except Refusal as refusal:
            self.refused_count += 1
            _log.info("refused %s %.80s: %s", request.method, request.raw_path, refusal)
            return _refuse(refusal)
        page = self._pages[path]
        content = page.render()
        body = content.encode() if isinstance(content, str) else content
        return web.Response(body=body, headers={**HEADERS, "Content-Type": page.content_type})

    async def _serve_client(self, request: web.BaseRequest) -> web.StreamResponse:
        if len(self._clients) >= MAX_CLIENTS:
            raise Refusal(429, f"There are {MAX_CLIENTS} QMP clients, which is the limit.")
        wire = new_socket()
        wire.headers.update(HEADERS)
        try:
            await wire.prepare(request)
        except web.HTTPBadRequest as error:
            raise Refusal(400, f"This is no WebSocket handshake: {error.text}") from error
        transport = request.transport
        if not isinstance(transport, asyncio.WriteTransport):
            return wire
        client = WebSocketClient(wire, transport, self._dispatcher, self._hub, held=self._held)
        self._clients.add(client)
        try:
            await client.run()
        finally:
            self._clients.discard(client)
        return wire

    async def _serve_watcher(self, request: web.BaseRequest, feed: Feed) -> web.StreamResponse:
        if feed.watcher_count >= MAX_WATCHERS:
            raise Refusal(429, f"There are {MAX_WATCHERS} watchers, which is the limit.")
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        response.force_close()
        feed.begin()
        number = 0
        try:
            await response.prepare(request)
            while True:
                number, event = await feed.next_event(number)
                async with asyncio.timeout(STALL_S):
                    await response.write(event)
        except ConnectionError:
            pass
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            feed.end()
        return response


def _head(request: web.BaseRequest) -> RequestHead:
    own: Any = request.get_extra_info("sockname")
    host, port = (own[0], own[1]) if isinstance(own, tuple) else ("", None)
    return RequestHead(request.method, request.raw_path, list(request.headers.items()), host, port)


def _refuse(refusal: Refusal) -> web.Response:
    headers = {**HEADERS, **refusal.headers}
    response = web.Response(status=refusal.status, text=f"{refusal}\n", headers=headers)
    response.force_close()
    return response


class _Protocol(web.RequestHandler):
    """aiohttp's connection, with our headers on its own errors, and no traceback for a bad request."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A request that aiohttp cannot read, or a bug of ours."""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _log.error("HTTP request %.80s failed unexpectedly", request.raw_path, exc_info=exc)
        else:
            _log.info("HTTP request not understood: %.80s", message)
        if request.writer.output_size > 0:
            raise ConnectionError("a response was begun")
        response = web.Response(status=status, text=f"{HTTPStatus(status).phrase}\n", headers=HEADERS)
        response.force_close()
        return response


class _Protocols(web.Server):
    """Makes a protocol for each connection, up to a bound."""

    def __init__(self, handler: Callable[[web.BaseRequest], Any]) -> None:
        super().__init__(handler, handler_cancellation=True)  # who has gone is not served on

    def make(self) -> asyncio.Protocol:
        """For asyncio's servers: one more connection, or its end."""
        if len(self.connections) >= MAX_CONNECTIONS:
            return _Full()
        return _Protocol(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_IDLE_S,
            lingering_time=0,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own servers pass it; the hint is too narrow
            logger=_log,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
            max_headers=_MAX_HEADERS,
        )

    async def close(self) -> None:
        """End all connections at once."""
        for connection in self.connections:
            connection.force_close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.shutdown(_CLOSE_S), 1.0)


class _Full(asyncio.Protocol):
    """There are enough connections: this one ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _vocabulary_pages(dispatcher: Dispatcher) -> dict[str, Page]:
    """The schema's documents, their index, the introspection, and the reference."""
    # What takes milliseconds to make is kept once it was asked for.
    documents = dispatcher.schema.documents
    index = {
        "documents": [f"/schema/{name}" for name in documents],
        "introspection": "/schema/query-qmp-schema",
        "reference": "/docs",
    }
    pages = {"/schema": Page("application/json", lambda: dump_json(index))}
    for name, document in documents.items():
        pages[f"/schema/{name}"] = Page("application/schema+json", lambda shown=document: dump_json(shown))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
    schema = dispatcher.schema
    introspection = cache(lambda: introspection_text(schema, dispatcher.names))
    reference = cache(
        lambda: reference_html(schema, dispatcher.names, hide_unstable=dispatcher.hide_unstable)
    )
    pages["/schema/query-qmp-schema"] = Page("application/json", introspection)
    pages["/docs"] = Page("text/html; charset=utf-8", reference)
    style = resources.files(__package__ or "qmp.http").joinpath("reference.css").read_bytes()
    pages["/docs.css"] = Page("text/css; charset=utf-8", lambda: style)
    return pages
