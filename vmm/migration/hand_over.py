"""Who may start the guest: the destination's side of the explicit hand-over between two Pageferries.

              X_START                      every page is here
    waiting -----------> started ------------------------------> complete
       |                    | the machine could not start it
       | X_KEEP, the connection broke, an error, asked for its fate
       +------------------> withdrawn

Rules
1. The order is given or withdrawn once, whichever comes first, under one lock.
2. A guest whose order is withdrawn is never started here: the source may be told so, and runs it again.
3. Silence and broken connections withdraw an order that was not given; they change nothing after it was.

What goes over the wire is in `peer.py`; the source's side is in `source_phases.py`.
"""

from __future__ import annotations

import logging
import threading
from enum import Enum

from vmm.migration.errors import MigrationError
from vmm.migration.peer import Fate

__all__ = ["MOVES", "Orders", "StartOrder", "StartState"]

log = logging.getLogger(__name__)

MOST_ORDERS = 16
"""How many migrations a destination remembers; arbitrary."""


class StartState(Enum):
    """What has become of the order."""

    WAITING = "waiting"
    WITHDRAWN = "withdrawn"
    STARTED = "started"
    COMPLETE = "complete"


_S = StartState

MOVES: dict[StartState, frozenset[StartState]] = {
    _S.WAITING: frozenset({_S.WITHDRAWN, _S.STARTED}),
    _S.STARTED: frozenset({_S.WITHDRAWN, _S.COMPLETE}),
    _S.WITHDRAWN: frozenset(),
    _S.COMPLETE: frozenset(),
}

_FATES = {
    _S.WITHDRAWN: Fate.NOT_STARTED,
    _S.STARTED: Fate.STARTED,
    _S.COMPLETE: Fate.COMPLETE,
}


class StartOrder:
    """The order to start one guest. Any thread."""

    def __init__(self) -> None:
        self._decided = threading.Condition()  # protects the state
        self._state = StartState.WAITING
        self._why: BaseException | None = None
        self.is_told = False
        """Has the source been told what became of it?"""

    @property
    def state(self) -> StartState:
        """What has become of it."""
        return self._state

    def _move(self, state: StartState, only_from: StartState) -> bool:
        with self._decided:
            if self._state is not only_from:
                return False
            assert state in MOVES[only_from], (only_from, state)
            self._state = state
            log.info("hand-over: %s -> %s", only_from.value, state.value)
            self._decided.notify_all()
            return True

    def give(self) -> bool:
        """The source hands the guest over; False if the order had been withdrawn."""
        self._move(_S.STARTED, _S.WAITING)
        return self._state is not _S.WITHDRAWN

    def withdraw(self, why: BaseException) -> bool:
        """The guest will not start here, unless the order was given first (False)."""
        with self._decided:
            if self._move(_S.WITHDRAWN, _S.WAITING):
                self._why = why
            return self._state is _S.WITHDRAWN

    def could_not_start(self) -> None:
        """The order was given, and the machine failed before the guest ran."""
        self._move(_S.WITHDRAWN, _S.STARTED)

    def complete(self) -> None:
        """Every page is here."""
        self._move(_S.COMPLETE, _S.STARTED)

    def check(self) -> None:
        """Raises what it was withdrawn for, if it was."""
        with self._decided:
            if self._why is not None:
                raise self._why

    def wait(self) -> None:
        """Until it is given. Raises what it was withdrawn for."""
        with self._decided:
            self._decided.wait_for(lambda: self._state is not _S.WAITING)
            self.check()

    def fate(self) -> Fate:
        """For the source, which asks on a new connection: so what is not given yet never comes."""
        self.withdraw(MigrationError("The source has asked for the guest on another connection"))
        self.is_told = True
        return _FATES[self._state]


class Orders:
    """The orders of one process's incoming migrations, by the name of each. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: dict[bytes, StartOrder] = {}

    def __bool__(self) -> bool:
        return bool(self._orders)

    def new(self, migration: bytes) -> StartOrder:
        """A new order. Raises MigrationError if there was one of this name, and it was given or told of."""
        with self._lock:
            before = self._orders.pop(migration, None)
            if before is not None and (before.is_told or before.state is not _S.WITHDRAWN):
                self._orders[migration] = before
                raise MigrationError(f"Migration {migration.hex()} has been here before")
            if len(self._orders) >= MOST_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[migration] = StartOrder()
            return self._orders[migration]

    def fate(self, migration: bytes) -> Fate:
        """What became of a migration."""
        with self._lock:
            order = self._orders.get(migration)
        return Fate.UNKNOWN if order is None else order.fate()
