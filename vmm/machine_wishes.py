"""What a guest does to itself: it exits, resets or panics, through a port or by a triple fault.

A guest that exits or resets through a port latches: port I/O of the rest of the block is dropped, and `grant`
decides on the vCPU's thread, when nothing runs any more. A panic does not: a guest that may go on after it
loses nothing.

Source of the behaviour: QEMU 7.2 softmmu/runstate.c.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from vmm.config import ActionConfig
from vmm.cpu.engine import Engine, Exit, ExitReason
from vmm.errors import PageferryError
from vmm.machine_devices import GuestWish
from vmm.machine_run import GuestRun
from vmm.run_state import RunState

__all__ = ["GuestWishes"]

log = logging.getLogger(__name__)

EXIT_FAILURE = 1


class Shutdown(Protocol):
    """See `Machine.request_shutdown`."""

    def __call__(self, cause: str, guest: bool, exit_status: int = 0) -> None: ...


class GuestWishes:
    """Of one machine. Every call comes on the vCPU's thread."""

    def __init__(
        self,
        actions: ActionConfig,
        engine: Engine,
        guest: GuestRun,
        shutdown: Shutdown,
        reset: Callable[[], None],
    ) -> None:
        """`reset` brings devices, CPU and boot image to what they were at the start."""
        self._actions = actions
        self._engine = engine
        self._guest = guest
        self._shutdown = shutdown
        self._reset = reset
        self._wish: tuple[GuestWish, int] | None = None

    def hear(self, wish: GuestWish, exit_status: int) -> None:
        """In a port handler, inside of the run."""
        if wish is GuestWish.CRASH_LOADED:
            self._guest.notify("GUEST_CRASHLOADED", {"action": "run"})
        elif wish is GuestWish.PANIC:
            self._panicked()
        else:
            self._latch(wish, exit_status)

    def grant(self, result: Exit) -> None:
        """The run has ended by itself. What goes wrong stops the guest; nothing is raised."""
        wish, self._wish = self._wish, None
        try:
            if result.reason is ExitReason.INTERNAL_ERROR:
                log.error("the vCPU has failed: %s", result.text)
                self._guest.stop_now(RunState.INTERNAL_ERROR)
            elif result.reason is ExitReason.TRIPLE_FAULT:
                self._grant_reset()
            else:
                assert wish is not None  # only `hear` latches
                self._grant(*wish)
        except BaseException as error:
            log.error("the machine has failed: %s", error, exc_info=not isinstance(error, PageferryError))
            self._guest.stop_now(RunState.INTERNAL_ERROR)

    def _latch(self, wish: GuestWish, exit_status: int) -> None:
        """Note it and end the run."""
        self._wish = (wish, exit_status)
        self._engine.latch()

    def _grant(self, wish: GuestWish, exit_status: int) -> None:
        if wish is GuestWish.RESET:
            self._grant_reset()
        else:
            cause = "guest-shutdown" if wish is GuestWish.EXIT else "guest-panic"
            self._shutdown(cause, guest=True, exit_status=exit_status)

    def _grant_reset(self) -> None:
        if self._actions.reboot == "shutdown":
            self._shutdown("guest-reset", guest=True)
            return
        self._reset()
        self._guest.go_on()

    def _panicked(self) -> None:
        actions = self._actions
        if actions.panic == "none":
            self._guest.notify("GUEST_PANICKED", {"action": "run"})
            return
        pause = actions.panic == "pause" or (actions.panic == "shutdown" and actions.shutdown == "pause")
        self._guest.notify("GUEST_PANICKED", {"action": "pause" if pause else "poweroff"})
        self._guest.stop_now(RunState.GUEST_PANICKED)
        if not pause:
            self._latch(GuestWish.PANIC, EXIT_FAILURE if actions.panic == "exit-failure" else 0)
