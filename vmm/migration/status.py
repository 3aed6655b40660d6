"""MigrationStatus, and its legal moves at the source and at the destination.

Rules
1. Every status is in both tables, also those with no way out and those this version never enters.
2. One method changes the status: `StatusMachine.move`. It logs each move, and reports it in order.
3. A move that the table does not have raises IllegalStatusMove and changes nothing.

After the hand-over nothing is cancelled: nobody but the destination may run the guest (design, rule 11). A
source that has handed over and does not hear what came of it is `postcopy-paused`, after precopy too: it
keeps the guest, and can ask again.

Source: QEMU 7.2 qapi/migration.json (MigrationStatus), migration/migration.c (migrate_set_state).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import Enum

from vmm.migration.errors import IllegalStatusMove

__all__ = ["IN_PROGRESS", "MOVES", "MigrationStatus", "Role", "StatusMachine"]

logger = logging.getLogger(__name__)


class MigrationStatus(Enum):
    """QEMU 7.2's names, in its order."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


class Role(Enum):
    """Which side of a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


_S = MigrationStatus

IN_PROGRESS = frozenset(
    {
        _S.SETUP,
        _S.CANCELLING,
        _S.ACTIVE,
        _S.POSTCOPY_ACTIVE,
        _S.POSTCOPY_PAUSED,
        _S.POSTCOPY_RECOVER,
        _S.COLO,
        _S.PRE_SWITCHOVER,
        _S.DEVICE,
        _S.WAIT_UNPLUG,
    }
)
"""A migration runs: no second one, no change of capabilities (migration.c: migration_is_running)."""

_SOURCE: dict[MigrationStatus, frozenset[MigrationStatus]] = {
    _S.NONE: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.CANCELLING, _S.FAILED}),
    _S.ACTIVE: frozenset(
        {
            _S.PRE_SWITCHOVER,
            _S.DEVICE,
            _S.POSTCOPY_ACTIVE,
            _S.POSTCOPY_PAUSED,
            _S.COMPLETED,
            _S.CANCELLING,
            _S.FAILED,
        }
    ),
    # With pause-before-switchover: migrate-continue leads on, to device in precopy.
    _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.POSTCOPY_ACTIVE, _S.CANCELLING, _S.FAILED}),
    _S.DEVICE: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.COMPLETED, _S.CANCELLING, _S.FAILED}),
    # Cancelling and failed only before the hand-over: the guest goes on here.
    _S.POSTCOPY_ACTIVE: frozenset({_S.COMPLETED, _S.POSTCOPY_PAUSED, _S.CANCELLING, _S.FAILED}),
    # Failed: the user has taken the guest back, or the destination did not start it.
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.FAILED}),
    # Completed: the destination had everything, only its last word was lost.
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.COMPLETED, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    # The next migration begins.
    _S.CANCELLED: frozenset({_S.SETUP}),
    _S.COMPLETED: frozenset({_S.SETUP}),
    _S.FAILED: frozenset({_S.SETUP}),
    # Not in this version.
    _S.COLO: frozenset(),
    _S.WAIT_UNPLUG: frozenset(),
}

_DESTINATION: dict[MigrationStatus, frozenset[MigrationStatus]] = {
    _S.NONE: frozenset({_S.SETUP}),
    # Listening. Failed: the socket cannot be had.
    _S.SETUP: frozenset({_S.ACTIVE, _S.FAILED}),
    # Back to setup: a stranger has been turned away before anything was loaded, and we listen again.
    _S.ACTIVE: frozenset({_S.POSTCOPY_ACTIVE, _S.COMPLETED, _S.FAILED, _S.SETUP}),
    _S.POSTCOPY_ACTIVE: frozenset({_S.COMPLETED, _S.POSTCOPY_PAUSED, _S.FAILED}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.FAILED}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.FAILED}),
    _S.COMPLETED: frozenset(),
    # Another migrate-incoming may follow, as long as nothing of the guest has been loaded.
    _S.FAILED: frozenset({_S.SETUP}),
    # Only a source has these.
    _S.CANCELLING: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.PRE_SWITCHOVER: frozenset(),
    _S.DEVICE: frozenset(),
    _S.COLO: frozenset(),
    _S.WAIT_UNPLUG: frozenset(),
}

MOVES: dict[Role, dict[MigrationStatus, frozenset[MigrationStatus]]] = {
    Role.SOURCE: _SOURCE,
    Role.DESTINATION: _DESTINATION,
}


class StatusMachine:
    """The status of one side's migration; any thread may ask and move it.

    `on_change(status)` is called for each move while the lock is held, so that reports come in the order of
    the moves: it may ask for the status, but must not wait for anything.
    """

    def __init__(self, role: Role, on_change: Callable[[MigrationStatus], None] | None = None) -> None:
        self._role = role
        self._on_change = on_change
        self._status = MigrationStatus.NONE
        # Protects _status and the order of reports; reentrant because on_change may ask.
        self._lock = threading.RLock()

    @property
    def role(self) -> Role:
        return self._role

    @property
    def status(self) -> MigrationStatus:
        with self._lock:
            return self._status

    @property
    def is_in_progress(self) -> bool:
        """Whether a migration runs now."""
        return self.status in IN_PROGRESS

    def move(self, status: MigrationStatus, *, only_from: MigrationStatus | None = None) -> bool:
        """Move to `status`; with `only_from`, do it only if that is the present one, else return False.

        Two threads that may both end something (a cancel and the completion) each name what they come from:
        one wins. Raises IllegalStatusMove if the table does not have the move; nothing has changed then.
        """
        with self._lock:
            before = self._status
            if only_from is not None and before is not only_from:
                return False
            if status not in MOVES[self._role][before]:
                raise IllegalStatusMove(self._role.value, before.value, status.value)
            self._status = status
            logger.info("Migration status at the %s: %s -> %s", self._role.value, before.value, status.value)
            if self._on_change is not None:
                self._on_change(status)
            return True
