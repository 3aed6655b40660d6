"""Where those wait who have connected and not yet said who they are: silence of one keeps nobody else out.

    listener --accept--> lobby --header and configuration are here, or it is no migration stream--> accept()
                           |                                              (mig/load reads them, and judges)
                           +-- silent for the time limit, or too many: closed

What has come is looked at, not taken: whoever is let in reads its stream from the first byte.
The model is QEMU's NBD server after CVE-2024-7409, which drops those who do not negotiate.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import time
from collections.abc import Callable

from vmm.migration.errors import Cancelled, PeerError
from vmm.migration.wire import RecordType

__all__ = ["MOST_WAITING", "Lobby", "is_introduced"]

log = logging.getLogger(__name__)

MOST_WAITING = 64
"""Arbitrary; the one that has been silent for longest makes room."""

HEADER = b"QEVM\0\0\0\3"
CONFIGURATION_BYTES = len(HEADER) + 1 + 4
LONGEST_LOOK = 512
"""Longer than any header with a configuration whose machine name may be accepted."""

OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def is_introduced(head: bytes) -> bool:
    """Can mig/load tell from these first bytes, without waiting, whether this may be a source?"""
    known = head[: len(HEADER)]
    if known != HEADER[: len(known)]:
        return True
    if len(head) <= len(HEADER):
        return False
    if head[len(HEADER)] != RecordType.CONFIGURATION:
        return True
    if len(head) < CONFIGURATION_BYTES:
        return False
    name_bytes = int.from_bytes(head[CONFIGURATION_BYTES - 4 : CONFIGURATION_BYTES], "big")
    return len(head) >= min(CONFIGURATION_BYTES + name_bytes, LONGEST_LOOK)


class Lobby:
    """Owns `listener` and those who wait. One thread (mig/load)."""

    def __init__(self, listener: socket.socket, limit_ms: Callable[[], int]) -> None:
        """`limit_ms` is asked once for each peer; 0: it may be silent for ever."""
        self._listener = listener
        self._limit_ms = limit_ms
        self._waiting: dict[int, tuple[socket.socket, float]] = {}  # descriptor -> peer, silent until
        self._turns: dict[int, int] = {}  # descriptor -> how many were let in before; for those who wait
        self._let_in_so_far = 0
        self._last_turn = 0  # of the one admitted last
        # Edge-triggered: a peer that says one byte and no more is looked at once for it.
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)

    def close(self) -> None:
        """Everybody out."""
        for peer, _ in self._waiting.values():
            peer.close()
        self._waiting.clear()
        self._turns.clear()
        self._epoll.close()
        self._listener.close()

    def admit(self, cancel_fd: int) -> socket.socket:
        """The next peer that has something to say.

        Raises:
            Cancelled: `cancel_fd` became readable.
            OSError: this process is out of descriptors or memory.
        """
        self._epoll.register(cancel_fd, select.EPOLLIN)
        try:
            peer = self._first_introduced()
            while peer is None:
                ready = {fd for fd, _ in self._epoll.poll(self._wait_s())}
                if cancel_fd in ready:
                    raise Cancelled()
                if self._listener.fileno() in ready:
                    self._let_in()
                peer = self._first_introduced()
                self._turn_away_the_silent()
            return peer
        finally:
            self._epoll.unregister(cancel_fd)

    def admit_next(self, cancel_fd: int, first_fd: int) -> socket.socket:
        """The one that was let in next after the one admitted last, though it says nothing.

        Raises:
            Cancelled, OSError: as `admit`.
            PeerError: `first_fd`, whose companion it is, was closed at the other end, or it took too long.
        """
        limit_ms = self._limit_ms()
        until_s = time.monotonic() + limit_ms / 1000 if limit_ms else float("inf")
        poll = select.poll()
        poll.register(cancel_fd, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        poll.register(first_fd, select.POLLRDHUP)
        while True:
            for fd, turn in self._turns.items():
                if turn == self._last_turn + 1:
                    peer, _ = self._waiting[fd]
                    self._forget(fd)
                    return peer
            left_s = until_s - time.monotonic()
            ready = {fd for fd, _ in poll.poll(None if left_s == float("inf") else max(left_s, 0) * 1000)}
            if cancel_fd in ready:
                raise Cancelled()
            if not ready or first_fd in ready:
                raise PeerError("The source has made no second connection, as postcopy-preempt needs")
            self._let_in()

    def _let_in(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in OUT_OF or not self._waiting:
                raise
            self._turn_away_the_first("there are no descriptors left")
            return
        if len(self._waiting) >= MOST_WAITING:
            self._turn_away_the_first(f"{MOST_WAITING} are waiting")
        peer.setblocking(False)
        limit_ms = self._limit_ms()
        until_s = time.monotonic() + limit_ms / 1000 if limit_ms else float("inf")
        self._waiting[peer.fileno()] = peer, until_s
        self._turns[peer.fileno()] = self._let_in_so_far
        self._let_in_so_far += 1
        self._epoll.register(peer, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def _wait_s(self) -> float | None:
        until_s = min((until for _, until in self._waiting.values()), default=float("inf"))
        return None if until_s == float("inf") else max(until_s - time.monotonic(), 0)

    def _first_introduced(self) -> socket.socket | None:
        for fd, (peer, _) in self._waiting.items():
            try:
                head = peer.recv(LONGEST_LOOK, socket.MSG_PEEK)
            except BlockingIOError:
                continue
            except OSError:
                head = b""  # reset: mig/load gets the same error, and says it
            if not head or is_introduced(head) or self._has_ended(peer):
                self._last_turn = self._turns[fd]
                self._forget(fd)
                return peer
        return None

    @staticmethod
    def _has_ended(peer: socket.socket) -> bool:
        """Has it closed its side after too few bytes? Then no more come, and mig/load says so."""
        poll = select.poll()
        poll.register(peer, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _turn_away_the_silent(self) -> None:
        now_s = time.monotonic()
        for fd, (peer, until_s) in list(self._waiting.items()):
            if until_s <= now_s:
                log.warning("a peer was turned away: it sent no migration stream in time")
                self._forget(fd)
                peer.close()

    def _turn_away_the_first(self, why: str) -> None:
        fd, (peer, _) = next(iter(self._waiting.items()))
        log.warning("a silent peer was turned away: %s", why)
        self._forget(fd)
        peer.close()

    def _forget(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        del self._waiting[fd], self._turns[fd]
