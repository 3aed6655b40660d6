"""The machine's run state: QEMU's names and its table of legal moves. Pure data and one check.

    prelaunch ─cont→ running ⇄ paused          running → finish-migrate → postmigrate ─cont→ running
    inmigrate → running | paused | any state that a migration can bring along
    running → shutdown | guest-panicked | internal-error;   any of them ─system_reset→ prelaunch

Rules: all transitions live here; a move to the same state is no move and always allowed.

Source: QEMU 7.2 `softmmu/runstate.c` (runstate_transitions_def) and `qapi/run-state.json`. The moves out of
finish-migrate back to whatever the guest was in before are those of QEMU 8.1: a migration of a guest that
was not running, once cancelled, gives back the state it found.
"""

from __future__ import annotations

from enum import StrEnum

from vmm.errors import IllegalRunState

__all__ = ["LEGAL_MOVES", "NEEDS_RESET", "RunState", "check_move"]


class RunState(StrEnum):
    """QEMU's RunState, as query-status shows it."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"


_S = RunState
_STOPPED_BY_ITSELF = (
    _S.INTERNAL_ERROR,
    _S.IO_ERROR,
    _S.SHUTDOWN,
    _S.SUSPENDED,
    _S.WATCHDOG,
    _S.GUEST_PANICKED,
)

LEGAL_MOVES: dict[RunState, frozenset[RunState]] = {
    _S.DEBUG: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.PRELAUNCH}),
    _S.INMIGRATE: frozenset(
        {_S.RUNNING, _S.PAUSED, _S.FINISH_MIGRATE, _S.PRELAUNCH, _S.POSTMIGRATE, _S.COLO, *_STOPPED_BY_ITSELF}
    ),
    _S.INTERNAL_ERROR: frozenset({_S.PAUSED, _S.FINISH_MIGRATE, _S.PRELAUNCH}),
    _S.IO_ERROR: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.PRELAUNCH}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.POSTMIGRATE, _S.PRELAUNCH, _S.COLO}),
    _S.POSTMIGRATE: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.PRELAUNCH}),
    _S.PRELAUNCH: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.INMIGRATE}),
    _S.FINISH_MIGRATE: frozenset(
        {_S.RUNNING, _S.PAUSED, _S.POSTMIGRATE, _S.PRELAUNCH, _S.COLO, *_STOPPED_BY_ITSELF}
    ),
    _S.RESTORE_VM: frozenset({_S.RUNNING, _S.PRELAUNCH}),
    _S.RUNNING: frozenset(
        {_S.DEBUG, _S.PAUSED, _S.FINISH_MIGRATE, _S.RESTORE_VM, _S.SAVE_VM, _S.COLO, *_STOPPED_BY_ITSELF}
    ),
    _S.SAVE_VM: frozenset({_S.RUNNING}),
    _S.SHUTDOWN: frozenset({_S.PAUSED, _S.FINISH_MIGRATE, _S.PRELAUNCH, _S.COLO}),
    _S.SUSPENDED: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.PRELAUNCH, _S.COLO}),
    _S.WATCHDOG: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.PRELAUNCH, _S.COLO}),
    _S.GUEST_PANICKED: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.PRELAUNCH}),
    _S.COLO: frozenset({_S.RUNNING, _S.PRELAUNCH, _S.SHUTDOWN}),
}

NEEDS_RESET = frozenset({_S.INTERNAL_ERROR, _S.SHUTDOWN})
"""States that `cont` does not leave: "Resetting the Virtual Machine is required"."""


def check_move(current: RunState, wanted: RunState) -> None:
    """Raises IllegalRunState if the table does not have the move."""
    if wanted is not current and wanted not in LEGAL_MOVES[current]:
        raise IllegalRunState(current.value, wanted.value)
