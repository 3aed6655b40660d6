"""`-http`: puts the gateway before the control side: QMP by WebSocket, metrics, the status page and its data.

aiohttp takes a quarter of a second to import, so that happens when `HttpControl.open` is called, not before.
The status is looked at a few times a second while somebody watches or a migration runs, else once a second:
the totals of the last migration are there after it ended, for a scraper that comes later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import orjson

from qmp.address import SocketAddress
from qmp.http.feed import Feed
from qmp.sockets import OwnFile, open_listener
from vmm.config import HttpConfig
from vmm.control.interfaces import MachineControl, MigratorControl
from vmm.control.machine import ram_bytes
from vmm.control.metrics import CONTENT_TYPE, MetricsText, migration_metrics
from vmm.control.migration_watch import MigrationWatch
from vmm.control.wiring import VERSION, Control
from vmm.errors import ChardevError, OptionError
from vmm.migration.status import MigrationStatus
from vmm.run_state import RunState

if TYPE_CHECKING:
    from qmp.http.gateway import Gateway, Page

__all__ = ["HttpControl", "StatusBoard"]

_log = logging.getLogger(__name__)

BUSY_PERIOD_S: Final = 0.2
IDLE_PERIOD_S: Final = 1.0
_EVENTS: Final = 60
"""How many of the last QMP events the page shows."""
_TOKEN_CHARACTERS: Final = (16, 4096)

STATIC: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/format.js": ("format.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}
"""Path -> file of `static/`, content type."""


class StatusBoard:
    """What the page and the metrics show, looked at now and then."""

    def __init__(self, control: Control, machine: MachineControl, migrator: MigratorControl) -> None:
        self._control = control
        self._machine = machine
        self._migrator = migrator
        self._watch = MigrationWatch()
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self.feed = Feed(self._refresh)

    def start(self) -> None:
        """Look from now on."""
        self._unsubscribe = self._control.hub.subscribe(self._on_event)
        self._tick()

    def stop(self) -> None:
        """Look no more."""
        self._unsubscribe()
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()

    def _on_event(self, event: dict[str, Any], line: bytes) -> None:
        stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        self._events.append({"time": stamp, "name": event["event"], "data": event.get("data", {})})
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._refresh)

    def _tick(self) -> None:
        self._refresh()
        is_busy = self.feed.watcher_count or self._watch.is_in_progress
        period_s = BUSY_PERIOD_S if is_busy else IDLE_PERIOD_S
        self._timer = asyncio.get_running_loop().call_later(period_s, self._tick)

    def _refresh(self) -> None:
        self._soon = None
        self._look()
        if self.feed.watcher_count:
            self.feed.publish(self.status_json())

    def _look(self) -> None:
        is_incoming = self._machine.run_state == RunState.INMIGRATE
        self._watch.look(self._migrator.query(), is_incoming, time.monotonic())

    def status_json(self) -> bytes:
        """What the page shows."""
        machine = self._machine
        shown = {
            "name": machine.config.name,
            "version": VERSION["package"],
            "pid": os.getpid(),
            "time": time.time(),
            "runState": str(machine.run_state),
            "ramBytes": ram_bytes(machine),
            "migration": self._watch.view(),
            "events": list(self._events),
        }
        return orjson.dumps(shown)

    def fresh_status(self) -> bytes:
        """What the page shows, as of now."""
        self._look()
        return self.status_json()

    def add_metrics(self, text: MetricsText) -> None:
        """The machine's and the migration's figures, as of now."""
        self._look()
        watch, machine = self._watch, self._machine
        text.add(
            "info", "gauge", "What this is.", 1, version=VERSION["package"], guest=machine.config.name or ""
        )
        text.add_states("run_state", "The run state.", [str(s) for s in RunState], str(machine.run_state))
        text.add("ram_bytes", "gauge", "Guest RAM.", ram_bytes(machine))
        states = [status.value for status in MigrationStatus]
        text.add_states("migration_status", "Of the last migration.", states, watch.status)
        if watch.status != "none":
            text.add(
                "migration_progress_ratio", "gauge", "Never runs backwards.", watch.progress, role=watch.role
            )
        ended = [
            ({"role": role, "result": result}, n) for (role, result), n in self._migrator.results.items()
        ]
        text.add_family("migrations_total", "counter", "Migrations that have ended.", ended)
        migration_metrics(text, watch.figures)


class HttpControl:
    """The gateway of one process, with what it owns: a socket's file and a token's."""

    def __init__(
        self,
        config: HttpConfig,
        control: Control,
        machine: MachineControl,
        migrator: MigratorControl,
        socket_clients: Callable[[], int],
    ) -> None:
        """`socket_clients` tells how many QMP clients the other monitors have."""
        self._config = config
        self._control = control
        self._socket_clients = socket_clients
        self._board = StatusBoard(control, machine, migrator)
        self._gateway: Gateway | None = None
        self._files: list[OwnFile] = []  # to be removed
        self.url = ""

    async def open(self) -> None:
        """Listen. QMP commands wait for `release`.

        Raises:
            OptionError: the token's file cannot be used.
            ChardevError: the address cannot be had.
        """
        from qmp.http.gateway import Gateway

        token = self._make_token() if self._config.token_path is None else self._read_token()
        self._gateway = Gateway(
            self._control.dispatcher,
            self._control.hub,
            token=token,
            pages=self._pages(),
            feeds={"/status/stream": self._board.feed},
            allowed_hosts=self._config.allowed_hosts,
            held=True,
        )
        config = self._config
        try:
            if config.path is not None:
                listener = await open_listener(SocketAddress.unix(config.path, server=True))
                self._own(config.path)
                self.url = f"unix:{config.path}"
            else:
                listener = await open_listener(SocketAddress.tcp(config.host, config.port, server=True))
                host, port = listener.getsockname()[:2]
                self.url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
        except OSError as error:
            raise ChardevError(f"{config.option}: {error.strerror or error}") from error
        await self._gateway.serve(listener)
        self._board.start()
        _log.info("HTTP is served at %s", self.url)

    def release(self) -> None:
        """From now on QMP commands are executed."""
        if self._gateway is not None:
            self._gateway.release()

    async def close(self, flush_s: float) -> None:
        """Send clients what they are owed for at most `flush_s` seconds, disconnect, remove our files."""
        self._board.stop()
        if self._gateway is not None:
            await self._gateway.close(flush_s)
        self.unlink()

    def unlink(self) -> None:
        """Remove the socket and a token that was made here, unless somebody has put others in their place."""
        for file in self._files:
            file.unlink()
        self._files = []

    def _own(self, path: str) -> None:
        self._files.append(OwnFile.at(os.path.abspath(path)))

    # Section: the token

    def _make_token(self) -> str:
        """A token in a new file that only its owner can read; where it is, is said in the log."""
        token = secrets.token_urlsafe(32)
        fd, path = tempfile.mkstemp(".token", "pageferry-", os.environ.get("XDG_RUNTIME_DIR"))  # mode 0600
        self._own(path)
        with open(fd, "w", encoding="ascii") as file:
            file.write(token + "\n")
        _log.warning("-http: no token=FILE was given; the token that /qmp asks for is in %s", path)
        return token

    def _read_token(self) -> str:
        path = self._config.token_path
        assert path is not None
        option = self._config.option
        try:
            with open(path, encoding="ascii") as file:
                mode = os.fstat(file.fileno()).st_mode
                token = file.read(_TOKEN_CHARACTERS[1] + 2).strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not ASCII text"
            raise OptionError(f"Cannot read the token in '{path}': {why}", option) from error
        if stat.S_IMODE(mode) & 0o077:
            got = f"expected mode 0600, got {stat.S_IMODE(mode):04o}"
            raise OptionError(f"The token in '{path}' can be read by others: {got}", option)
        low, high = _TOKEN_CHARACTERS
        if not low <= len(token) <= high or not token.isprintable() or " " in token:
            raise OptionError(f"The token in '{path}' is not one line of {low} to {high} characters", option)
        return token

    # Section: pages

    def _pages(self) -> dict[str, Page]:
        from qmp.http.gateway import Page

        folder = resources.files("vmm.control").joinpath("static")

        def static(name: str, content_type: str) -> Page:
            content = folder.joinpath(name).read_bytes()
            return Page(content_type, lambda: content)

        pages = {path: static(name, content_type) for path, (name, content_type) in STATIC.items()}
        pages["/status"] = Page("application/json", self._board.fresh_status)
        pages["/metrics"] = Page(CONTENT_TYPE, self._metrics)
        return pages

    def _metrics(self) -> str:
        text = MetricsText()
        self._board.add_metrics(text)
        dispatcher, hub, gateway = self._control.dispatcher, self._control.hub, self._gateway
        text.add("qmp_commands_total", "counter", "QMP commands so far.", dispatcher.executed_count)
        text.add("qmp_errors_total", "counter", "Of those, answered by an error.", dispatcher.failed_count)
        text.add("qmp_events_total", "counter", "QMP events so far.", hub.emitted_count)
        if gateway is not None:
            clients = [
                ({"transport": "socket"}, self._socket_clients()),
                ({"transport": "websocket"}, gateway.client_count),
            ]
            text.add_family("qmp_clients", "gauge", "QMP clients that are connected.", clients)
            text.add("http_requests_total", "counter", "HTTP requests so far.", gateway.request_count)
            text.add("http_refused_total", "counter", "Of those, refused.", gateway.refused_count)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        text.add("cpu_seconds_total", "counter", "Of this process.", usage.ru_utime + usage.ru_stime)
        return str(text)
