"""auto-converge: the vCPU stands still for a share of each short slice, so that the guest dirties less.

mig/throttle stops and resumes the vCPU by the machine's own protocol (`vcpu_quiet`): acknowledged, invisible
to the guest's users, and a `stop` or `cont` of theirs has its effect in the middle of it. How much,
`throttle.py` decides. Time that the vCPU took to stop was time it ran: it is made up for in the next slices.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from vmm.migration.params import Capability
from vmm.migration.throttle import ThrottleDecision, next_slice
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from vmm.migration.guest import MigratableMachine
    from vmm.migration.params import Capabilities, Parameters
    from vmm.migration.stats import MigrationStats

__all__ = ["AutoConverge", "CpuThrottle"]

MAX_DEBT_S: Final = 0.1
"""What is made up for at most, and so how long the guest stands still at most; arbitrary."""


class CpuThrottle:
    """Keeps a vCPU still for a percentage of the time, once `set` was called, until `end`."""

    def __init__(self, quiet: Callable[[], AbstractContextManager[None]]) -> None:
        self._quiet = quiet
        self._ending = threading.Event()
        self._percentage = 0
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def set(self, percentage: int) -> None:
        """1 to 99, from the next slice on."""
        self._percentage = percentage
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="mig/throttle")
            self._thread.start()

    def end(self) -> None:
        """Let the vCPU run freely; may be called twice. Raises what mig/throttle died of."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _main(self) -> None:
        try:
            self._throttle()
        except BaseException as error:
            self.error = error

    def _throttle(self) -> None:
        ran_since_s, debt_s = time.monotonic(), 0.0
        while not self._ending.wait(next_slice(self._percentage)[0]):
            with self._quiet():
                stopped_s = time.monotonic()
                share = self._percentage / 100
                debt_s = min(debt_s + (stopped_s - ran_since_s) * share / (1 - share), MAX_DEBT_S)
                self._ending.wait(debt_s)
                ran_since_s = time.monotonic()
            debt_s = max(debt_s - (ran_since_s - stopped_s), -MAX_DEBT_S)


class AutoConverge:
    """The capability auto-converge of one outgoing migration; does nothing without it. (mig/source)"""

    def __init__(
        self,
        machine: MigratableMachine,
        capabilities: Capabilities,
        parameters: Parameters,
        stats: MigrationStats,
    ) -> None:
        self._is_on = capabilities[Capability.AUTO_CONVERGE]
        self._stats = stats
        self._decision = ThrottleDecision(parameters, time.monotonic())
        self._throttle = CpuThrottle(machine.vcpu_quiet)

    def synced(self, dirtied_pages: int) -> None:
        """A bitmap sync of precopy has found so many pages."""
        if not self._is_on:
            return
        sent = self._stats.snapshot().transferred_bytes
        if self._decision.synced(time.monotonic(), dirtied_pages * PAGE_SIZE_BYTES, sent):
            self._throttle.set(self._decision.percentage)
            self._stats.set_throttle(self._decision.percentage)

    def end(self) -> None:
        """The guest is stopped for the switchover, or stays here unthrottled. Raises as `CpuThrottle.end`."""
        self._is_on = False
        self._stats.set_throttle(0)
        self._throttle.end()
