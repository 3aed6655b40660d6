"""The guest runs or stands still: run state, vCPU, clocks, timers and devices in step; events in that order.

The life of a stop:
1. (any thread) a caller sets the run state and the vCPU's stop flag, and STOP is emitted;
2. (vcpu) its thread leaves the engine at the end of its block and acknowledges;
3. (any thread) whoever waits for the vCPU goes on.
Between 1 and 2 the guest may still run, or be parked on a page of postcopy that is to come: whoever needs
the guest still waits for the acknowledgement. What the rest of the block says is held in the device until the
guest goes on.

Rules:
1. The run state changes in `move`, under the lock, by the table of vmm.run_state.
2. Nothing here waits. STOP and RESUME are told under the lock, so that they come in the moves' order.
3. The vCPU is let run in `_let_run` only; within `kept_from_running` nobody lets it.

Source of the behaviour: QEMU 7.2 softmmu/runstate.c, softmmu/cpus.c.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vmm.clock import VirtualClock
from vmm.cpu.engine import Engine
from vmm.cpu.vcpu import Vcpu
from vmm.machine_devices import Devices
from vmm.machine_sections import GlobalStateSection
from vmm.run_state import RunState, check_move
from vmm.timers import Timers

__all__ = ["GuestRun", "Notify"]

log = logging.getLogger(__name__)

Notify = Callable[[str, dict[str, Any]], None]
"""Called with a QMP event's name and data, on any thread; must not wait."""


class GuestRun:
    """Of one machine; the guest stands still until `run`.

    `move`, `run` and `halt` are called under `lock`: a caller decides by the state first.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        engine: Engine,
        clock: VirtualClock,
        timers: Timers,
        devices: Devices,
        global_state: GlobalStateSection,
    ) -> None:
        """`global_state` remembers what a guest did that a migration has stopped."""
        self._vcpu = vcpu
        self._engine = engine
        self._clock = clock
        self._timers = timers
        self._devices = devices
        self._global_state = global_state
        self._listeners: tuple[Notify, ...] = ()
        self.lock = threading.RLock()  # protects the run state, what goes with it, and the order of events
        self._state = RunState.PRELAUNCH
        self._is_closing = False
        self._quiet = 0

    @property
    def state(self) -> RunState:
        """As query-status shows it."""
        return self._state

    @property
    def is_closing(self) -> bool:
        """The vCPU is not let run any more."""
        return self._is_closing

    def close(self) -> None:
        """From now on the vCPU is not let run."""
        with self.lock:
            self._is_closing = True

    def add_listener(self, notify: Notify) -> None:
        """Have `notify` called with every event from now on."""
        self._listeners = (*self._listeners, notify)

    def notify(self, name: str, data: dict[str, Any]) -> None:
        """Tell everybody of an event."""
        for listener in self._listeners:
            listener(name, data)

    # ---- moves, under the lock ----

    def move(self, new: RunState) -> None:
        """Raises IllegalRunState; the guest neither starts nor stops by it."""
        check_move(self._state, new)
        if new is not self._state:
            log.info("run state %s -> %s", self._state, new)
            self._state = new

    def run(self) -> None:
        """Let the guest run. Raises IllegalRunState."""
        self.move(RunState.RUNNING)
        self.notify("RESUME", {})
        self._devices.release_output()
        self._engine.enable_ticks()
        self._clock.start()
        self._timers.resume()
        self._devices.virtio.resume()
        self._let_run()

    def halt(self, target: RunState) -> None:
        """Stop the guest that runs; does not wait for the vCPU. Raises IllegalRunState."""
        check_move(self._state, target)
        self._vcpu.request_pause()
        self._devices.hold_output()
        self._clock.stop()
        self._timers.pause()
        self._devices.virtio.pause()
        self._engine.disable_ticks()
        self.move(target)
        self.notify("STOP", {})

    def _let_run(self) -> None:
        if self._state is RunState.RUNNING and not self._quiet and not self._is_closing:
            self._vcpu.resume()

    # ---- any thread ----

    def stop_now(self, target: RunState) -> None:
        """As QEMU's vm_stop, without waiting: a guest that does not run keeps its run state."""
        with self.lock:
            if self._state is RunState.RUNNING:
                self.halt(target)
            elif self._state is RunState.FINISH_MIGRATE:
                self._global_state.stored = target  # it ended itself while a migration stopped it

    def go_on(self) -> None:
        """An exit has paused the vCPU by itself: run on, unless somebody stopped the guest meanwhile."""
        with self.lock:
            self._let_run()

    @contextlib.contextmanager
    def kept_from_running(self) -> Iterator[None]:
        """The vCPU is told to pause, and not let run within; for the guest's user nothing happens."""
        with self.lock:
            self._quiet += 1
            self._vcpu.request_pause()
        try:
            yield
        finally:
            with self.lock:
                self._quiet -= 1
                self._let_run()
