"""A machine without a CPU: RAM, one device section, and a guest that is a thread writing to RAM."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from vmm.ram import GuestRam, RAMBlock, RamKind
from vmm.run_state import RunState
from vmm.vmstate import Description, Field, Values

__all__ = ["FakeMachine"]

PAGE = 4096

COUNTER = Description("counter", 1, 1, (Field("rounds", "uint64"), Field("next_page", "uint64")))


@dataclass(frozen=True)
class FakeConfig:
    """Fits `MigrationConfig`."""

    uuid: UUID | None
    incoming: str | None


class FakeMachine:
    """Fits `MigratableMachine`. Its guest adds one to the first byte of each page of a range, for ever.

    What it has reached is device state, as registers would be: after any number of migrations each page of
    the range holds `rounds` (mod 256), and one more below `next_page`.
    """

    def __init__(
        self,
        pages: int = 1024,
        *,
        kind: RamKind = RamKind.ANONYMOUS,
        working_set: int = 256,
        incoming: bool = False,
        paused: bool = False,
        rung: str = "auto",
    ) -> None:
        self.block = RAMBlock("ram", pages * PAGE, kind)
        self.ram = GuestRam([self.block])
        self.machine_type_name = "none"
        self.config = FakeConfig(None, "defer" if incoming else None)
        self.cpu_log = None
        self.dirty_log_rung: Any = rung
        self.run_state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self.start_paused = paused
        self.working_set = working_set
        self.rounds = 0
        self.next_page = 0
        self.loaded_run_state = True
        self._wanted = threading.Event()
        self._closing = False
        self._parked = threading.Event()
        self._parked.set()
        self._before = RunState.PRELAUNCH
        self.started = threading.Event()
        self.cont_guard: Any = lambda: None
        self.on_hand_over_soon: Any = lambda: None
        self._thread = threading.Thread(target=self._guest, name="guest")
        self._thread.start()
        self.idstr, self.instance_id, self.description = "counter", 0, COUNTER

    # the guest

    def _guest(self) -> None:
        while not self._closing:
            if not self._wanted.wait(0.05):
                self._parked.set()
                continue
            self._parked.clear()
            while self._wanted.is_set() and not self._closing:
                self.step()
            self._parked.set()

    def step(self) -> None:
        """One page further."""
        offset = self.next_page * PAGE
        value = self.block.read(offset, 1, may_wait=True)[0]
        # A guest store: past the write listeners, so that the dirty log has to see it by itself.
        self.block._mapping.write(offset, bytes([(value + 1) % 256]))
        self.next_page += 1
        if self.next_page == self.working_set:
            self.next_page = 0
            self.rounds += 1

    def wrong_pages(self) -> list[int]:
        """Pages of the working set that do not hold what the guest has written. It must be stopped."""
        return [
            page
            for page in range(self.working_set)
            if self.block.read(page * PAGE, 1)[0] != (self.rounds + (page < self.next_page)) % 256
        ]

    def cont(self) -> None:
        self.run_state = RunState.RUNNING
        self._wanted.set()

    def pause(self) -> None:
        self.run_state = RunState.PAUSED
        self._wanted.clear()
        assert self._parked.wait(5)

    def close(self) -> None:
        self._closing = True
        self._wanted.clear()
        self._thread.join()

    # MigratableMachine

    @property
    def vcpu_thread_id(self) -> int:
        return self._thread.native_id or 0

    def sections(self) -> list[Any]:
        return [self]

    def save(self) -> Values:
        return {"rounds": self.rounds, "next_page": self.next_page}

    def load(self, values: Values, version: int) -> None:
        del version
        if values["next_page"] >= self.working_set:
            raise ValueError(f"next_page {values['next_page']}")
        self.rounds, self.next_page = values["rounds"], values["next_page"]

    def stop_for_migration(self, wait_s: float) -> bool:
        if self.run_state is not RunState.FINISH_MIGRATE:
            self._before, self.run_state = self.run_state, RunState.FINISH_MIGRATE
        self._wanted.clear()
        return self._parked.wait(wait_s)

    def vcpu_quiet(self) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError("no test throttles this machine")

    def quiesce_devices(self, timeout_s: float) -> None:
        del timeout_s

    def resume_after_migration(self) -> None:
        self.run_state = self._before
        if self._before is RunState.RUNNING:
            self.cont()

    def power_off(self, exit_status: int) -> None:
        raise AssertionError(f"nothing here ends with {exit_status}")

    def stop(self, target: RunState, wait_s: float | None) -> bool:
        self.run_state = target
        self._wanted.clear()
        return self._parked.wait(wait_s)

    def set_run_state(self, new: RunState) -> None:
        self.run_state = new

    def start_after_migration(self) -> None:
        if self.start_paused:
            self.run_state = RunState.PAUSED
        else:
            self.cont()
        self.started.set()

    def forget_incoming_state(self) -> None:
        self.rounds = self.next_page = 0
        self.run_state = RunState.INMIGRATE
