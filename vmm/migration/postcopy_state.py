"""The postcopy state of the destination: none -> advise -> discard -> listening -> running -> end.

              POSTCOPY_ADVISE       RAM_DISCARD          LISTEN              RUN             END
        none ------------> advise ------------> discard ---------> listening -----> running -----> end
                              |                   ^  |                 ^
                              |                   +--+ RAM_DISCARD     |
                              +------------------- LISTEN -------------+

Rules
1. A command of the wire is an event; what is not in the table raises WrongPostcopyState and changes nothing.
2. No page was out of date: LISTEN may follow ADVISE at once.
3. END is not a command in QEMU 7.2: it stands for the end of the `ram` section and of the stream. It ends
   advise too: precopy was fast enough, and what postcopy had set up is cleaned away.
4. POSTCOPY_RESUME and RECV_BITMAP belong to recovery and change nothing here. They may find us listening
   still: the connection can break while the package is being loaded.

Source: QEMU 7.2 migration/savevm.c (loadvm_postcopy_handle_*), docs/devel/migration.rst.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import Enum

from vmm.migration.errors import WrongPostcopyState

__all__ = ["MOVES", "PostcopyEvent", "PostcopyState", "PostcopyStateMachine"]

logger = logging.getLogger(__name__)


class PostcopyState(Enum):
    """Where the destination is in postcopy."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    RUNNING = "running"
    END = "end"


class PostcopyEvent(Enum):
    """What moves it; the values are the wire's names of the commands."""

    ADVISE = "POSTCOPY_ADVISE"
    DISCARD = "POSTCOPY_RAM_DISCARD"
    LISTEN = "POSTCOPY_LISTEN"
    RUN = "POSTCOPY_RUN"
    RESUME = "POSTCOPY_RESUME"
    RECV_BITMAP = "RECV_BITMAP"
    END = "END"


_S, _E = PostcopyState, PostcopyEvent

MOVES: dict[PostcopyState, dict[PostcopyEvent, PostcopyState]] = {
    _S.NONE: {_E.ADVISE: _S.ADVISE},
    _S.ADVISE: {_E.DISCARD: _S.DISCARD, _E.LISTEN: _S.LISTENING, _E.END: _S.END},
    _S.DISCARD: {_E.DISCARD: _S.DISCARD, _E.LISTEN: _S.LISTENING},
    _S.LISTENING: {_E.RUN: _S.RUNNING, _E.RESUME: _S.LISTENING, _E.RECV_BITMAP: _S.LISTENING},
    _S.RUNNING: {_E.END: _S.END, _E.RESUME: _S.RUNNING, _E.RECV_BITMAP: _S.RUNNING},
    _S.END: {},
}


class PostcopyStateMachine:
    """The postcopy state of one incoming migration; the load and the listen thread both move it.

    `on_change(state)` is called once for each new state while the lock is held; it must not wait.
    """

    def __init__(self, on_change: Callable[[PostcopyState], None] | None = None) -> None:
        self._on_change = on_change
        self._state = PostcopyState.NONE
        # Protects _state and the order of reports; reentrant because on_change may ask.
        self._lock = threading.RLock()

    @property
    def state(self) -> PostcopyState:
        with self._lock:
            return self._state

    def handle(self, event: PostcopyEvent) -> PostcopyState:
        """Take an event and return the state after it; raises WrongPostcopyState if it may not come now."""
        with self._lock:
            before = self._state
            after = MOVES[before].get(event)
            if after is None:
                raise WrongPostcopyState(event.value, before.value)
            self._state = after
            if after is not before:
                logger.info("Postcopy state: %s -> %s (%s)", before.value, after.value, event.value)
                if self._on_change is not None:
                    self._on_change(after)
            return after
