"""mig/return: reads what the destination says, page requests (in C, straight to the queue) and the rest.

It ends by itself with SHUT, or when the channel is shut down. What mig/source needs to hear it waits for
here, each `wait_...` with the descriptor that cancels it; nothing that nobody waits for may come.
Source: QEMU 7.2 migration/migration.c (source_return_path_thread).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from vmm.errors import PageferryError, StreamTruncated
from vmm.migration.cancel import CancelEvent, KickEvent
from vmm.migration.errors import Cancelled, IllegalRecord, PeerClosed, PeerError, PeerReported, PeerSilent
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.peer import ALIVE_MAGIC, ANSWER_MAGIC, HELLO_MAGIC, Fate
from vmm.migration.return_path import (
    FateReply,
    Loaded,
    Message,
    MessageReader,
    Pong,
    RecvBitmapReply,
    ResumeAck,
    Shut,
    Started,
)
from vmm.migration.silence import SilenceWatch
from vmm.migration.wire import MAX_RETURN_PATH_PAYLOAD_BYTES, PING_BEFORE_PACKAGE, PING_PACKAGE_END
from vmm.vmstate import BytesSource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.migration.byte_stream import StreamReader
    from vmm.migration.page_pump.sender import PageSender
    from vmm.vmstate import ByteSource

__all__ = ["ReturnPathThread"]

log = logging.getLogger(__name__)

MOST_PONGS = 4096
"""Of different values that nobody has waited for; arbitrary, far above what we ever ask at once."""

DISCARD_S = 5.0
"""Arbitrary: a destination that is busy, or the network, may take that long; the guest runs meanwhile."""


class ReturnPathThread:
    """Reads messages from `reader` until SHUT. One for each channel.

    `on_error` is called when the destination breaks the protocol or the connection, or is silent, so that
    mig/source stops talking to it.
    """

    def __init__(
        self,
        sender: PageSender,
        reader: StreamReader,
        on_error: Callable[[], None],
        peer_timeout_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        self._sender = sender
        self._reader = reader
        self._on_error = on_error
        self._done = CancelEvent()
        self._news = KickEvent()
        self._messages = MessageReader({b.name: b.page_count for b in sender.blocks.blocks})
        self._thread = threading.Thread(target=self._main, name="mig/return")
        self._watch = SilenceWatch(self._heard, peer_timeout_ms, self._silent)
        self._shut: int | None = None
        self._error: BaseException | None = None
        self._silence: PeerSilent | None = None
        self._awaited: set[object] = set()  # message types, and names of blocks: mig/source adds, we take
        self._pongs: set[int] = set()
        self._said: dict[type, Message] = {}
        self._bitmaps: dict[str, bytes] = {}
        self.peer_is_pageferry = False

    def start(self) -> None:
        """Start the thread, and the one that watches the peer."""
        self._thread.start()
        self._watch.start()

    # ---- what it knows; any thread ----

    @property
    def destination_did_not_start(self) -> bool:
        """Has a Pageferry said that it failed before it started the guest? (Stock's word is not enough.)"""
        return self.peer_is_pageferry and bool(self._shut)

    @property
    def destination_has_started(self) -> bool:
        """Has it said that the guest runs, or, where it has no word for that, that it has loaded it?"""
        fate = self._said.get(FateReply)
        if isinstance(fate, FateReply) and fate.fate in (Fate.STARTED, Fate.COMPLETE):
            return True
        return Started in self._said or (not self.peer_is_pageferry and PING_PACKAGE_END in self._pongs)

    # ---- mig/source ----

    def check(self) -> None:
        """Raises what has ended the thread: as `wait_shut`, and PeerError if the destination is done."""
        if self._done.is_set:
            self._join_and_raise()
            raise PeerError("The destination says that it is done before it has everything")

    def wait_introduced(self, cancel_fd: int, timeout_s: float) -> bool:
        """Wait until we know whether it is a Pageferry; False if it answers no PING in that time.

        Raises:
            PeerError, StreamError, OSError, Cancelled: as `wait_shut`.
        """
        end_s = time.monotonic() + timeout_s
        return self._wait(lambda: HELLO_MAGIC in self._pongs, cancel_fd, end_s)

    def wait_discarded(self, cancel_fd: int) -> None:
        """Wait a moment until the destination has obeyed the discards; more would be no better than none.

        Raises:
            PeerError, StreamError, OSError, Cancelled: as `wait_shut`.
        """
        end_s = time.monotonic() + DISCARD_S
        self._wait(lambda: PING_BEFORE_PACKAGE in self._pongs, cancel_fd, end_s)

    def take_pong(self, ping: int) -> bool:
        """Was this PING answered since the last time? (mig/source)"""
        try:
            self._pongs.remove(ping)
        except KeyError:
            return False
        return True

    def expect(self, *awaited: object) -> None:
        """Types of messages, and names of blocks whose received maps, may come now, once each."""
        self._awaited.update(awaited)

    def wait_loaded(self, cancel_fd: int) -> None:
        """Wait until the destination has all that a start needs. Raises as `wait_introduced`."""
        self._wait(lambda: Loaded in self._said, cancel_fd)

    @property
    def is_loaded(self) -> bool:
        """Has the destination all that a start needs?"""
        return Loaded in self._said

    def wait_fate(self, cancel_fd: int) -> Fate:
        """What became of the migration that was asked for. Raises as `wait_introduced`."""
        self._wait(lambda: FateReply in self._said, cancel_fd)
        reply = self._said[FateReply]
        assert isinstance(reply, FateReply), "kept by its type"
        return reply.fate

    def wait_bitmaps(self, blocks: Sequence[str], cancel_fd: int) -> dict[str, bytes]:
        """The received maps of these blocks, checked. Raises as `wait_introduced`."""
        self._wait(lambda: all(name in self._bitmaps for name in blocks), cancel_fd)
        return self._bitmaps

    def wait_resume_ack(self, cancel_fd: int) -> None:
        """Wait until the destination has agreed to go on. Raises as `wait_introduced`."""
        self._wait(lambda: ResumeAck in self._said, cancel_fd)

    def _wait(self, holds: Callable[[], bool], cancel_fd: int, end_s: float | None = None) -> bool:
        while not holds():
            self.check()
            left_ms = -1 if end_s is None else max(int((end_s - time.monotonic()) * 1000), 0)
            if not wait_fd(self._news.fd, cancel_fd, left_ms):
                return False
            self._news.take()
        return True

    def wait_shut(self, cancel_fd: int) -> None:
        """Wait for the destination's last word.

        Raises:
            PeerReported: it failed.
            PeerClosed, StreamError, OSError: the channel ended or broke before that word.
            Cancelled: `cancel_fd` became readable.
        """
        wait_fd(self._done.fd, cancel_fd)
        self._join_and_raise()

    def _join_and_raise(self) -> None:
        self._thread.join()
        if self._silence is not None:
            raise self._silence
        if isinstance(self._error, StreamTruncated):
            raise PeerClosed("The destination closed the connection before it was done") from self._error
        if self._error is not None:
            raise self._error
        if self._shut:
            raise PeerReported(self._shut)

    def last_word(self, timeout_ms: int, cancel_fd: int) -> PageferryError | None:
        """The channel is broken: did the destination break the protocol, or say that it failed?"""
        with contextlib.suppress(Cancelled):
            wait_fd(self._done.fd, cancel_fd, timeout_ms)
        if self._shut:
            return PeerReported(self._shut)
        if self._silence is not None:
            return self._silence
        if isinstance(self._error, PageferryError) and not isinstance(
            self._error, StreamTruncated | Cancelled
        ):
            return self._error
        return None

    def join(self) -> None:
        """Wait for the threads, if they were started; the reader's cancel event has been set."""
        if self._thread.ident is not None:
            self._thread.join()
        self._watch.stop()
        if self._error is not None:
            self._error.__traceback__ = None  # which leads back here, and would keep descriptors open

    # ---- mig/watch ----

    def _heard(self) -> int | None:
        """Any destination answers the first PING; a Pageferry gives signs of life until its last word."""
        is_expected = not self._pongs or self.peer_is_pageferry or ALIVE_MAGIC in self._pongs
        is_expected &= not self._done.is_set
        return self._reader.received_bytes if is_expected else None

    def _silent(self, how_long: str) -> None:
        self._silence = PeerSilent(f"The destination is silent: {how_long}")
        log.error("%s", self._silence)
        self._on_error()

    # ---- mig/return ----

    def _main(self) -> None:
        try:
            while self._shut is None:
                self._take(*self._sender.read_message(self._reader))
                self._news.kick()
        except Cancelled as error:
            self._error = error
        except (PageferryError, OSError) as error:
            log.info("mig/return ends: %s", error)
            self._error = error
            self._on_error()  # it is gone, or went wrong: nobody takes what mig/source still sends
        finally:
            self._done.set()
            self._news.kick()
            self._sender.wake()

    def _take(self, message_type: int, payload: bytes) -> None:
        source = _Joined(payload, self._reader)
        match message := self._messages.read_payload(source, message_type, len(payload)):
            case Shut(value):
                self._shut = value
            case Pong(value):
                log.debug("pong %#x", value)
                if len(self._pongs) == MOST_PONGS:
                    raise IllegalRecord("PONG", expected="the answer to a PING that was sent", got=hex(value))
                self._pongs.add(value)
                self.peer_is_pageferry |= value == ANSWER_MAGIC
            case RecvBitmapReply(block, bitmap) if block in self._awaited:
                self._awaited.remove(block)
                self._bitmaps[block] = bitmap
            case Loaded() | Started() | FateReply() | ResumeAck() if type(message) in self._awaited:
                self._awaited.remove(type(message))
                self._said[type(message)] = message
                self._sender.wake()  # mig/source may be serving pages until it comes
            case _:
                got = type(message).__name__
                raise IllegalRecord("return path message", expected="one that may come now", got=got)


class _Joined:
    """A payload, and the stream behind it, where RECV_BITMAP has its bitmap. A ByteSource.

    Its offset is that in the stream, so that an error says where the destination went wrong.
    """

    def __init__(self, payload: bytes, rest: ByteSource) -> None:
        self._payload = BytesSource(payload)
        self._rest = rest

    @property
    def offset(self) -> int:
        return self._rest.offset - len(self._payload.peek(MAX_RETURN_PATH_PAYLOAD_BYTES))

    def read(self, n: int, /) -> bytes:
        left = len(self._payload.peek(n))
        return self._payload.read(left) + (self._rest.read(n - left) if n > left else b"")

    def peek(self, n: int, /) -> bytes:
        return self._payload.peek(n) or self._rest.peek(n)
