"""mig/return: reads what the destination says, page requests (in C, straight to the queue) and the rest.

It ends by itself with SHUT, or when the channel is shut down; `wait_shut` tells mig/source how it went.
Source: QEMU 7.2 migration/migration.c (source_return_path_thread).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from vmm.errors import PageferryError, StreamTruncated
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled, IllegalRecord, PeerClosed, PeerReported
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.peer import ANSWER_MAGIC
from vmm.migration.return_path import MessageReader, Pong, Shut
from vmm.vmstate import BytesSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.byte_stream import StreamReader
    from vmm.migration.page_pump.sender import PageSender

__all__ = ["ReturnPathThread"]

log = logging.getLogger(__name__)


class ReturnPathThread:
    """Reads messages from `reader` until SHUT. One for each channel.

    `on_error` is called when the destination breaks the protocol, so that mig/source stops talking to it.
    """

    def __init__(self, sender: PageSender, reader: StreamReader, on_error: Callable[[], None]) -> None:
        self._sender = sender
        self._reader = reader
        self._on_error = on_error
        self._done = CancelEvent()
        self._messages = MessageReader({b.name: b.page_count for b in sender.blocks.blocks})
        self._thread = threading.Thread(target=self._main, name="mig/return")
        self._shut: int | None = None
        self._error: BaseException | None = None
        self.peer_is_pageferry = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def destination_did_not_start(self) -> bool:
        """Has a Pageferry said that it failed before it started the guest? (Stock's word is not enough.)"""
        return self.peer_is_pageferry and bool(self._shut)

    def wait_shut(self, cancel_fd: int) -> None:
        """Wait for the destination's last word.

        Raises:
            PeerReported: it failed.
            PeerClosed, StreamError, OSError: the channel ended or broke before that word.
            Cancelled: `cancel_fd` became readable.
        """
        wait_fd(self._done.fd, cancel_fd)
        self._thread.join()
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
        if isinstance(self._error, PageferryError) and not isinstance(
            self._error, StreamTruncated | Cancelled
        ):
            return self._error
        return None

    def join(self) -> None:
        """Wait for the thread, if it was started; the reader's cancel event has been set."""
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        try:
            while self._shut is None:
                self._take(*self._sender.read_message(self._reader))
        except Cancelled as error:
            self._error = error
        except (PageferryError, OSError) as error:
            log.info("mig/return ends: %s", error)
            self._error = error
            if not isinstance(error, StreamTruncated | OSError):
                self._on_error()
        finally:
            self._done.set()

    def _take(self, message_type: int, payload: bytes) -> None:
        message = self._messages.read_payload(BytesSource(payload), message_type, len(payload))
        match message:
            case Shut(value):
                self._shut = value
            case Pong(value):
                log.debug("pong %#x", value)
                self.peer_is_pageferry |= value == ANSWER_MAGIC
            case _:
                got = type(message).__name__
                raise IllegalRecord("return path message", expected="one that may come now", got=got)
