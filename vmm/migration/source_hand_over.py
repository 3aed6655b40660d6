"""The hand-over at the source: the one step after which the guest is the destination's.

    peer         what hands the guest over                     until then
    Pageferry    X_START, after the destination has said     any failure, cancel or cut leaves the
                 that it has all that a start needs          guest here
    stock QEMU   the first byte of the record that starts    the same; a cut inside of that record leaves
                 it (EOF, or the package)                    nobody who knows: the guest stays paused here
    file, exec   the file has its name, the command has      the same
                 ended with status 0 (`Channel.publish`)

Rules
1. Directly before it RAM is looked at once more: a page written since the last sync keeps the guest here.
2. A cancel and the hand-over exclude each other (`SourceControl`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from vmm.migration.errors import MigrationError
from vmm.migration.return_path import Loaded, Started

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.source_control import SourceControl
    from vmm.migration.source_return import ReturnPathThread
    from vmm.migration.source_stream import SourceStream

__all__ = ["SourceHandOver"]

log = logging.getLogger(__name__)

INTRODUCTION_S = 5.0
"""Arbitrary: who has not answered a PING for so long is treated as one that knows nothing of us."""


class SourceHandOver:
    """How this migration hands over; used by mig/source alone."""

    def __init__(self, stream: SourceStream, control: SourceControl, *, is_withheld: bool) -> None:
        self._stream = stream
        self._control = control
        self._is_withheld = is_withheld
        self.migration: bytes | None = None
        """The name under which the destination knows this migration, if it is a Pageferry."""

    def agree(self, return_path: ReturnPathThread | None) -> None:
        """Before the last pages, while the guest runs: find out who the peer is, and name the migration.

        Raises:
            PeerError, StreamError, OSError, Cancelled: as `ReturnPathThread.wait_introduced`.
        """
        if return_path is None:
            return
        cancel_fd = self._control.cancel.fd
        if not return_path.wait_introduced(cancel_fd, INTRODUCTION_S):
            log.warning("the destination answers no PING: the hand-over is that of a stock QEMU")
        if return_path.peer_is_pageferry:
            self.migration = os.urandom(16)
            log.info("the hand-over of migration %s is explicit", self.migration.hex())
            return_path.expect(Loaded, Started)
            self._stream.name(self.migration)

    def give(
        self,
        send_last: Callable[[], None],
        check: Callable[[], None],
        return_path: ReturnPathThread | None,
        serve: Callable[[], None] | None = None,
    ) -> None:
        """Hand over. `send_last` writes what the start needs last, `check` raises if the guest has written.

        In postcopy devices ask for pages while they load: `serve` sends them, and waits a little for more.

        Raises:
            Cancelled: a cancel came first.
            MigrationError, StreamError, OSError: it failed; `SourceControl.handed_over` says on which side.
        """
        if self.migration is None:
            check()
            if not self._is_withheld:
                self._control.hand_over()
            send_last()
            return
        assert return_path is not None, "a migration has a name after its peer has answered"
        send_last()
        try:
            while serve is not None and not return_path.is_loaded:
                return_path.check()
                serve()
            return_path.wait_loaded(self._control.cancel.fd)
            check()
            self._control.hand_over()
        except MigrationError:
            with contextlib.suppress(MigrationError, OSError):
                self._stream.keep()  # it waits for our word; the end of the channel is one, too
            raise
        self._stream.start()
