"""A character backend: a bounded queue from the UART to the outside, and input from there when there is room.

    vCPU thread --write_nowait--> queue --loop: flush--> Wire          Wire --loop--> frontend.receive
                                    full: the UART keeps the byte; room again: frontend.backend_writable()

Rules:
1. Everything that touches the outside happens on the loop's thread; `write_nowait`, `accept_input` and
   `wait_flushed` may be called from any thread, and only the last one waits.
2. With nobody at the other end of a socket output is dropped, as in QEMU: a UART never waits for a listener.
3. The lock is never held while the frontend is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["QUEUE_BYTES", "Backend", "Frontend", "Wire"]

log = logging.getLogger(__name__)

QUEUE_BYTES = 4096
"""Arbitrary: a page of text; small, since a migration waits until the queue is out."""
READ_BYTES = 4096
PACE_S = 0.001
"""Between two flushes. A UART gives byte after byte: to send each by itself takes a guest's time to print."""


class Frontend(Protocol):
    """The UART as a backend sees it."""

    def can_receive(self) -> int:
        """How many bytes it takes now."""

    def receive(self, data: bytes) -> None:
        """Bytes from outside, at most as many as it said."""

    def backend_writable(self) -> None:
        """There is room in the queue again."""


class Wire(Protocol):
    """The outside: two non-blocking descriptors, one of which may be missing."""

    read_fd: int | None
    write_fd: int | None

    def read(self, n: int) -> bytes:
        """Up to n bytes; b"" at the end. Raises BlockingIOError or OSError."""

    def write(self, data: bytes) -> int:
        """How many bytes were taken. Raises BlockingIOError or OSError."""

    def close(self) -> None: ...


class Backend:
    """The queue and the flow control that all kinds share; `connect` gives it a wire."""

    def __init__(self, label: str, filename: str, loop: asyncio.AbstractEventLoop) -> None:
        """Create it on the loop's thread."""
        self.label = label
        self.filename = filename
        self._loop = loop
        self._frontend: Frontend | None = None
        self._wire: Wire | None = None
        self._when_opened: list[Callable[[], None]] = []
        self._state = threading.Condition()  # protects the four below; notified when the queue is out
        self._queue = bytearray()
        self._connected = False
        self._refused = False
        self._input_held = False
        self._flushed_at_s = 0.0

    @property
    def is_open(self) -> bool:
        """Somebody is at the other end."""
        return self._connected

    def attach(self, frontend: Frontend) -> None:
        """Let input flow to `frontend`."""
        self._frontend = frontend
        if self._wire is not None:
            self._watch_input()

    # ---- any thread ----

    def write_nowait(self, data: bytes) -> int:
        """See `CharSink`."""
        with self._state:
            if not self._connected:
                return len(data)
            taken = data[: QUEUE_BYTES - len(self._queue)]
            self._refused = self._refused or len(taken) < len(data)
            was_empty = not self._queue
            self._queue += taken
        if was_empty and taken:
            self._call(self._flush_paced)
        return len(taken)

    def accept_input(self) -> None:
        """See `CharSink`."""
        if self._input_held:
            self._call(self._watch_input)

    def wait_flushed(self, timeout_s: float, /) -> bool:
        """See `CharSink`; not on the loop's thread."""
        deadline = time.monotonic() + timeout_s
        if self._queue:
            self._call(self._flush)
        with self._state:
            while self._queue:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._state.wait(remaining):
                    return not self._queue
        return True

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(function)

    # ---- the loop's thread ----

    def connect(self, wire: Wire) -> None:
        """Use `wire` from now on, and own it."""
        self._wire = wire
        with self._state:
            self._connected = True
        self._watch_input()
        for callback in self._when_opened:
            callback()

    def when_opened(self, callback: Callable[[], None]) -> None:
        """Be told each time somebody comes to the other end, and now if somebody is there."""
        self._when_opened.append(callback)
        if self._connected:
            callback()

    def when_focused(self, callback: Callable[[bool], None]) -> None:
        """Of a `Mux` port: this backend has one user."""

    def disconnect(self) -> None:
        """Close the wire; what is queued is lost."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        for fd, remove in (
            (wire.read_fd, self._loop.remove_reader),
            (wire.write_fd, self._loop.remove_writer),
        ):
            if fd is not None:
                remove(fd)
        wire.close()
        with self._state:
            self._connected = False
            self._input_held = False
            self._queue.clear()
            refused, self._refused = self._refused, False
            self._state.notify_all()
        if refused and self._frontend is not None:
            self._frontend.backend_writable()
        self.disconnected()

    def disconnected(self) -> None:
        """For those that wait for the next client."""

    async def drain(self, timeout_s: float) -> None:
        """Send what is queued, for at most `timeout_s` seconds."""
        deadline = self._loop.time() + timeout_s
        while self._queue and self._wire is not None and self._loop.time() < deadline:
            self._flush()
            if self._queue:
                await asyncio.sleep(0.005)

    def close(self) -> None:
        """Let go of everything; `drain` first."""
        self.disconnect()

    def _flush_paced(self) -> None:
        """At once after a pause, else together with what comes in the next moment."""
        rest_s = self._flushed_at_s + PACE_S - self._loop.time()
        if rest_s > 0:
            self._loop.call_later(rest_s, self._flush)
        else:
            self._flush()

    def _flush(self) -> None:
        self._flushed_at_s = self._loop.time()
        wire = self._wire
        if wire is None or wire.write_fd is None:
            return
        # The vCPU may append meanwhile; what was written is taken off the front only then.
        data = bytes(self._queue)
        try:
            written = wire.write(data) if data else 0
        except BlockingIOError:
            written = 0
        except OSError as error:
            log.warning("%s: output failed: %s", self.filename, error)
            self.disconnect()
            return
        with self._state:
            del self._queue[:written]
            left = bool(self._queue)
            tell = self._refused and bool(written)
            if written:
                self._refused = False
            if not left:
                self._state.notify_all()
        self._watch_output(wire.write_fd, left)
        if tell and self._frontend is not None:
            self._frontend.backend_writable()

    def _watch_output(self, fd: int, wanted: bool) -> None:
        if not wanted:
            self._loop.remove_writer(fd)
            return
        try:
            self._loop.add_writer(fd, self._flush)
        except PermissionError:  # a regular file cannot be polled: it takes everything
            self._loop.call_soon(self._flush)

    def _watch_input(self) -> None:
        wire = self._wire
        if wire is None or wire.read_fd is None:
            return
        self._input_held = True  # before looking, so that room made right after it is heard of
        if self._frontend is None or not self._frontend.can_receive():
            self._loop.remove_reader(wire.read_fd)
            return
        self._input_held = False
        # A regular file or /dev/null as stdin cannot be polled: it gives no input.
        with contextlib.suppress(PermissionError):
            self._loop.add_reader(wire.read_fd, self._on_readable)

    def _on_readable(self) -> None:
        wire, frontend = self._wire, self._frontend
        if wire is None or frontend is None:
            return
        room = frontend.can_receive()
        try:
            data = wire.read(min(room, READ_BYTES)) if room else None
        except BlockingIOError:
            return
        except OSError as error:
            log.info("%s: input failed: %s", self.filename, error)
            data = b""
        if data == b"":
            self.input_ended()
            return
        if data:
            frontend.receive(data)
        self._watch_input()

    def input_ended(self) -> None:
        """End of file: the other end has gone."""
        self.disconnect()
