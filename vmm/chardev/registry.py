"""Makes the character backends that the settings name, and knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Any

from vmm.chardev.address import socket_address
from vmm.chardev.backend import Backend
from vmm.chardev.mux import Mux, MuxPort
from vmm.chardev.sockets import SocketBackend
from vmm.chardev.terminal import Terminal
from vmm.chardev.wires import open_file, open_stdio
from vmm.config import ChardevConfig
from vmm.errors import ChardevError

__all__ = ["Chardevs"]


class _StdioBackend(Backend):
    """End of file on stdin ends the input only."""

    def input_ended(self) -> None:
        assert self._wire is not None
        assert self._wire.read_fd is not None
        self._loop.remove_reader(self._wire.read_fd)


class Chardevs:
    """All backends of the process that are not monitors' sockets. All methods: the loop's thread."""

    def __init__(
        self,
        configs: tuple[ChardevConfig, ...],
        loop: asyncio.AbstractEventLoop,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_exit`: somebody typed Ctrl-A X."""
        self._on_exit = on_exit
        self._configs = {config.id: config for config in configs}
        self._loop = loop
        self._open: dict[str, Backend] = {}
        self._shared: dict[str, Mux] = {}
        self._terminal: Terminal | None = None

    def config(self, name: str) -> ChardevConfig:
        """The configuration with that id."""
        return self._configs[name]

    async def open(self, name: str) -> Backend | MuxPort:
        """Open the backend for its one user, or for one of several (mux=on). Raises ChardevError."""
        if name in self._shared:
            return self._shared[name].new_port(self._loop)
        config = self._configs[name]
        try:
            self._open[name] = backend = await self._make(config)
        except OSError as error:
            text = error.strerror or str(error)
            raise ChardevError(f"{config.option}: {text}") from error
        if config.mux:
            self._shared[name] = mux = Mux(backend, self._on_exit)
            return mux.new_port(self._loop)
        return backend

    async def _make(self, config: ChardevConfig) -> Backend:
        if config.backend == "socket":
            sock = SocketBackend(config, self._loop)
            await sock.open()
            return sock
        if config.backend == "stdio":
            backend: Backend = _StdioBackend(config.id, "stdio", self._loop)
            backend.connect(open_stdio())
            self.take_terminal(config)
            return backend
        if config.backend == "file":
            assert config.path is not None
            backend = Backend(config.id, "file", self._loop)
            try:
                backend.connect(open_file(config.path, append=config.append))
            except OSError as error:
                raise OSError(error.errno, f"Could not open '{config.path}': {error.strerror}") from error
            return backend
        return Backend(config.id, "null", self._loop)

    def take_terminal(self, config: ChardevConfig) -> None:
        """stdin is the guest's from now on."""
        with contextlib.suppress(OSError):
            self._terminal = terminal = Terminal(0, signals=config.signal)
            self._loop.add_signal_handler(signal.SIGCONT, terminal.take_back)

    async def wait_clients(self) -> None:
        """Until every server with wait=on has its first client."""
        for name, backend in self._open.items():
            if isinstance(backend, SocketBackend) and self._configs[name].server and self._configs[name].wait:
                await backend.wait_client()

    def describe(self) -> list[dict[str, Any]]:
        """query-chardev."""
        entries = []
        for name, config in self._configs.items():
            filename = socket_address(config).describe() if config.backend == "socket" else config.backend
            entries.append({"label": name, "filename": filename, "frontend-open": True})
        return entries

    async def drain(self, timeout_s: float) -> None:
        """Send what the guest has printed."""
        await asyncio.gather(*(backend.drain(timeout_s) for backend in self._open.values()))

    def close(self) -> None:
        """Give everything back: terminal, sockets, files."""
        self.restore_terminal()
        for backend in self._open.values():
            backend.close()
        self._open.clear()

    def restore_terminal(self) -> None:
        """The part of `close` that must not be left out even if the process hangs."""
        if self._terminal is not None:
            self._terminal.restore()

    def unlink(self) -> None:
        """Remove socket files: what `close` does and another process would stumble over."""
        for backend in self._open.values():
            if isinstance(backend, SocketBackend):
                backend.unlink()
