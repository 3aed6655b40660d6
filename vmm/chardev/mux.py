"""Several users of one character backend, as QEMU's mux=on: all may write, one at a time is typed to.

    backend <--- Mux <--- Port (serial port)        Ctrl-A C moves the focus to the next port
                     <--- Port (human monitor)      Ctrl-A X ends the process, Ctrl-A Ctrl-A is a Ctrl-A

Input that the port in focus does not take yet is kept here, so that Ctrl-A X is heard even when the guest
reads nothing. Source of keys and texts: QEMU `chardev/char-mux.c`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from vmm.chardev.backend import Backend, Frontend

__all__ = ["Mux", "MuxPort"]

ESCAPE = 0x01
KEPT_BYTES = 65536
"""Of input for one port. Arbitrary: more than anybody types, little enough to hold back a file."""
HELP = (
    "\n\rC-a h    print this help\n\rC-a x    exit emulator\n\r"
    "C-a c    switch between console and monitor\n\rC-a C-a  sends C-a\n\r"
)


class Mux:
    """The frontend of a backend, and the backend of its ports. All methods: the loop's thread."""

    def __init__(self, backend: Backend, on_exit: Callable[[], None]) -> None:
        self.backend = backend
        self._on_exit = on_exit
        self._ports: list[MuxPort] = []
        self._focus = 0
        self._is_escaped = False
        backend.attach(self)

    def new_port(self, loop: asyncio.AbstractEventLoop) -> MuxPort:
        """A port for one more user; the first has the focus."""
        port = MuxPort(self, loop)
        port.has_focus = not self._ports
        self._ports.append(port)
        return port

    # ---- called by the backend ----

    def can_receive(self) -> int:
        return KEPT_BYTES - len(self._ports[self._focus].kept) if self._ports else 0

    def receive(self, data: bytes) -> None:
        plain = bytearray()
        for byte in data:
            if not self._is_escaped:
                if byte == ESCAPE:
                    self._is_escaped = True
                else:
                    plain.append(byte)
                continue
            self._is_escaped = False
            if byte == ESCAPE:
                plain.append(byte)
                continue
            self._ports[self._focus].take(bytes(plain))
            plain.clear()
            self._command(byte)
        self._ports[self._focus].take(bytes(plain))

    def backend_writable(self) -> None:
        for port in self._ports:
            if port.frontend is not None:
                port.frontend.backend_writable()

    # ---- keys ----

    def _command(self, key: int) -> None:
        if key in b"h?":
            self.backend.write_nowait(HELP.encode())
        elif key == ord("x"):
            self.backend.write_nowait(b"QEMU: Terminated\n\r")
            self._on_exit()
        elif key == ord("c"):
            self._ports[self._focus].set_focus(False)
            self._focus = (self._focus + 1) % len(self._ports)
            self._ports[self._focus].set_focus(True)


class MuxPort:
    """One user's share of the backend: what a `Backend` is to the only user of one."""

    def __init__(self, mux: Mux, loop: asyncio.AbstractEventLoop) -> None:
        self._mux = mux
        self._loop = loop
        self._on_focus: Callable[[bool], None] | None = None
        self.frontend: Frontend | None = None
        self.kept = bytearray()
        self.has_focus = False

    # ---- any thread: see `CharSink` ----

    def write_nowait(self, data: bytes) -> int:
        return self._mux.backend.write_nowait(data)

    def accept_input(self) -> None:
        if self.kept:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._pass_on)

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return self._mux.backend.wait_flushed(timeout_s)

    # ---- the loop's thread ----

    def attach(self, frontend: Frontend) -> None:
        """Let input flow to `frontend`."""
        self.frontend = frontend
        self._pass_on()

    def when_opened(self, callback: Callable[[], None]) -> None:
        """Be told when somebody comes to the other end, or is there."""
        self._mux.backend.when_opened(callback)

    def when_focused(self, callback: Callable[[bool], None]) -> None:
        """Be told when the focus comes or goes, and now."""
        self._on_focus = callback
        callback(self.has_focus)

    def set_focus(self, has_focus: bool) -> None:
        """Typed text comes to this port, or no longer does; its user is told."""
        self.has_focus = has_focus
        if self._on_focus is not None:
            self._on_focus(has_focus)

    def take(self, data: bytes) -> None:
        """Input for this port."""
        self.kept += data
        self._pass_on()

    def _pass_on(self) -> None:
        while self.kept and self.frontend is not None and (room := self.frontend.can_receive()):
            data = bytes(self.kept[:room])
            del self.kept[:room]
            self.frontend.receive(data)
        self._mux.backend.accept_input()
