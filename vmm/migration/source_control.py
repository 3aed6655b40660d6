"""What others want of a running migration, and the one point at which the guest changes hands.

A cancel and the hand-over exclude each other: whichever takes the lock first wins, and the other one is told.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from vmm.migration.cancel import CancelEvent, KickEvent
from vmm.migration.channel_types import Channel
from vmm.migration.errors import Cancelled, MigrationRefused, TakenBack
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.status import MigrationStatus, StatusMachine

__all__ = ["SourceControl"]

log = logging.getLogger(__name__)

Connect = Callable[[int], Channel]
"""Connects to the destination; the argument is the descriptor that cancels it."""

NO_CANCEL = (
    "Postcopy migration in progress, cannot cancel. The guest was handed over and may run at the destination;"
    " if the connection is lost, go on with migrate-recover there and migrate with resume here"
)
"""10.2's text, and what to do instead."""


class SourceControl:
    """The wishes of users (any thread), read by mig/source."""

    def __init__(self, status: StatusMachine) -> None:
        self.status = status
        self.cancel = CancelEvent()
        self.postcopy_wanted = False
        self.continue_wanted = False
        self.handed_over = False
        self.is_postcopy = False
        self._way_back: Connect | None = None
        self._is_taken_back = False
        self._connecting: CancelEvent | None = None
        self._kick = KickEvent()
        self._lock = threading.Lock()

    # ---- any thread ----

    def request_cancel(self) -> None:
        """See `Source.cancel`."""
        with self._lock:
            status = self.status.status
            if not self.status.is_in_progress or status is MigrationStatus.CANCELLING:
                return
            if self.handed_over:
                raise MigrationRefused(NO_CANCEL)
            self.status.move(MigrationStatus.CANCELLING)
            self.cancel.set()

    def request_postcopy(self) -> None:
        """See `Source.start_postcopy`."""
        self.postcopy_wanted = True
        self._kick.kick()

    def request_continue(self) -> None:
        """See `Source.continue_`."""
        self.continue_wanted = True
        self._kick.kick()

    def request_resume(self, connect: Connect) -> None:
        """Ask the destination again over another channel; takes the place of a connection under way.

        Raises:
            MigrationRefused: the migration is not paused.
        """
        with self._lock:
            self._check_paused()
            self._way_back = connect
            self._stop_connecting()
        self._kick.kick()

    def request_take_back(self) -> None:
        """The destination is gone for good. Raises MigrationRefused: the migration is not paused."""
        with self._lock:
            self._check_paused()
            self._is_taken_back = True
            self._stop_connecting()
        self._kick.kick()

    def _check_paused(self) -> None:
        if self.status.status is not MigrationStatus.POSTCOPY_PAUSED or self._is_taken_back:
            raise MigrationRefused("Cannot resume if there is no paused migration")

    def abandon(self) -> None:
        """The process ends: every wait of mig/source ends."""
        self.cancel.set()
        with self._lock:
            self._stop_connecting()

    def _stop_connecting(self) -> None:
        if self._connecting is not None:
            self._connecting.set()

    # ---- mig/source ----

    def connect_again(self) -> Channel:
        """Wait until the user knows a way to the destination, and take it.

        Raises:
            TakenBack: there is none any more.
            Cancelled: the process ends, or the user knows a better one by now: call again.
            MigrationError, OSError: nobody is there.
        """
        while True:
            with self._lock:
                self.check_cancelled()
                if self._is_taken_back:
                    raise TakenBack()
                connect, self._way_back = self._way_back, None
                connecting = self._connecting = CancelEvent()
            if connect is not None:
                return connect(connecting.fd)
            self.wait_for_wish()

    def begin_recover(self) -> None:
        """A channel is there. Raises TakenBack if the user came first."""
        with self._lock:
            if self._is_taken_back:
                raise TakenBack()
            self.status.move(MigrationStatus.POSTCOPY_RECOVER)

    def check_cancelled(self) -> None:
        """Raises Cancelled if somebody wants that."""
        if self.cancel.is_set:
            raise Cancelled()

    def wait_for_wish(self, timeout_ms: int = -1) -> None:
        """Sleep until a user wants something, or for `timeout_ms`. Raises Cancelled."""
        wait_fd(self._kick.fd, self.cancel.fd, timeout_ms)
        self._kick.take()

    def end_here(self) -> bool:
        """The guest stays here: the status is `cancelled` if somebody wanted that, else `failed` (False).

        Under the lock: a cancel that came between the look at the status and its move would find the table
        without a move from `cancelling` to `failed`, and the status would stay `cancelling` for ever.
        """
        with self._lock:
            if self.status.move(MigrationStatus.CANCELLED, only_from=MigrationStatus.CANCELLING):
                return True
            self.status.move(MigrationStatus.FAILED)
            return False

    def begin_postcopy(self) -> None:
        """The guest will run there before all of it is there. Raises Cancelled if a cancel came first."""
        with self._lock:
            self.check_cancelled()
            self.status.move(MigrationStatus.POSTCOPY_ACTIVE)
            self.is_postcopy = True

    def hand_over(self, publish: Callable[[], None] = lambda: None) -> None:
        """The next byte lets the destination start the guest, or `publish` does; no cancel comes in between.

        Raises:
            Cancelled: a cancel came first.
            OSError: `publish` failed, and the guest is not handed over.
        """
        with self._lock:
            self.check_cancelled()
            publish()
            self.handed_over = True
        log.info("hand-over: from here on the destination may run the guest")
