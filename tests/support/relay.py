"""A stranger in the middle of a migration: passes the stream on, keeps a copy, can cut or change it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

__all__ = ["CutAt", "Cutter", "Relay", "at_byte", "before", "passes"]

CHUNK = 1 << 16


class Relay:
    """Listens at `path` for one source and connects to `target`; both are paths of unix sockets.

    `change(total, data)` may give other bytes than the source sent; `total` is what came before them. It may
    set `cut_now`: then what it gives is the last that the destination gets. `change_back` is the same for the
    return path.
    """

    def __init__(
        self,
        path: str,
        target: str,
        change: Callable[[int, bytes], bytes] = lambda _total, data: data,
        change_back: Callable[[int, bytes], bytes] = lambda _total, data: data,
    ) -> None:
        self.stream = bytearray()
        """What the source has sent."""
        self.answers = bytearray()
        """What the destination has sent."""
        self.cut_now = False
        self._change = change
        self._change_back = change_back
        self._target = target
        self._ends: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._threads = [threading.Thread(target=self._forward, name="relay")]
        self._threads[0].start()

    def _forward(self) -> None:
        try:
            source, _ = self._listener.accept()
        except OSError:
            return  # closed without a source
        destination = socket.socket(socket.AF_UNIX)
        destination.connect(self._target)
        self._ends = [source, destination]
        self._threads.append(
            threading.Thread(target=self._back, args=(destination, source), name="relay back")
        )
        self._threads[1].start()
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                changed = self._change(len(self.stream), data)
                self.stream += data
                destination.sendall(changed)
                if self.cut_now:
                    self.cut()
            destination.shutdown(socket.SHUT_WR)

    def _back(self, destination: socket.socket, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := destination.recv(CHUNK):
                changed = self._change_back(len(self.answers), data)
                self.answers += data
                source.sendall(changed)
                if self.cut_now:
                    self.cut()
            source.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Break the connection, both ways at once."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Break what stands and join the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "the relay did not end"
        for end in (self._listener, *self._ends):
            end.close()


CutAt = Callable[[bytes], int | None]
"""What has come so far -> how much of it may pass before the cut; None: all, and there is no cut yet."""


class Cutter:
    """Changes what passes a relay by ending it."""

    def __init__(self, cut_at: CutAt) -> None:
        self._cut_at = cut_at
        self._seen = bytearray()
        self.relay: Relay | None = None

    def __call__(self, total: int, data: bytes) -> bytes:
        self._seen += data
        at = self._cut_at(bytes(self._seen))
        if at is None:
            return data
        assert self.relay is not None
        self.relay.cut_now = True
        return data[: max(at - total, 0)]


def passes(_seen: bytes) -> None:
    """Nothing is cut."""


def at_byte(number: int) -> CutAt:
    return lambda seen: number if len(seen) >= max(number, 1) else None


def before(message: bytes) -> CutAt:
    return lambda seen: at if (at := seen.find(message)) >= 0 else None
