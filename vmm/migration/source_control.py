"""What others want of a running migration, and the one point at which the guest changes hands.

A cancel and the hand-over exclude each other: whichever takes the lock first wins, and the other one is told.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from vmm.migration.cancel import CancelEvent, KickEvent
from vmm.migration.errors import Cancelled, MigrationRefused
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.status import MigrationStatus, StatusMachine

__all__ = ["SourceControl"]

log = logging.getLogger(__name__)


class SourceControl:
    """The wishes of users (any thread), read by mig/source."""

    def __init__(self, status: StatusMachine) -> None:
        self.status = status
        self.cancel = CancelEvent()
        self.postcopy_wanted = False
        self.continue_wanted = False
        self.handed_over = False
        self._kick = KickEvent()
        self._lock = threading.Lock()

    # ---- any thread ----

    def request_cancel(self) -> None:
        """See `Source.cancel`."""
        with self._lock:
            status = self.status.status
            if not self.status.is_in_progress or status is MigrationStatus.CANCELLING:
                return
            if self.handed_over or status is MigrationStatus.POSTCOPY_ACTIVE:
                raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
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

    # ---- mig/source ----

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
        """From here on a cancel is refused. Raises Cancelled if one came first."""
        with self._lock:
            self.check_cancelled()
            self.status.move(MigrationStatus.POSTCOPY_ACTIVE)

    def hand_over(self, publish: Callable[[], None] = lambda: None) -> None:
        """The next byte lets the destination start the guest, or `publish` does, within which no cancel comes.

        Raises:
            Cancelled: a cancel came first.
            OSError: `publish` failed, and the guest is not handed over.
        """
        with self._lock:
            self.check_cancelled()
            publish()
            self.handed_over = True
        log.info("hand-over: from here on the destination may run the guest")
