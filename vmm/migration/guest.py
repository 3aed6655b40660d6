"""What the migration stack needs of a machine, and nothing else: the face that `vmm.machine` shows to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol
from uuid import UUID

from vmm.migration.dirty_log import CpuLog, Rung
from vmm.ram import GuestRam
from vmm.run_state import RunState
from vmm.vmstate import Section

__all__ = ["MigratableMachine"]


class MigrationConfig(Protocol):
    """The part of the machine's configuration that matters to a migration."""

    @property
    def uuid(self) -> UUID | None:
        """The machine's UUID, if it was given one."""

    @property
    def incoming(self) -> str | None:
        """The argument of -incoming, if the process was started with it."""


class MigratableMachine(Protocol):
    """One machine; every method may be called from any thread."""

    ram: GuestRam

    machine_type_name: str
    """What the configuration record carries."""

    @property
    def config(self) -> MigrationConfig:
        """What the command line said."""

    @property
    def run_state(self) -> RunState:
        """As query-status shows it."""

    @property
    def cpu_log(self) -> CpuLog | None:
        """The CPU engine's own log of stores."""

    dirty_log_rung: Rung
    """What the user wants of the dirty log."""

    def sections(self) -> Sequence[Section]:
        """Device and CPU state, in the stream's order."""

    @property
    def vcpu_thread_id(self) -> int:
        """The vCPU's thread as the kernel knows it: whose page faults the guest's are."""

    # ---- source ----

    def stop_for_migration(self, wait_s: float) -> bool:
        """Stop the guest (finish-migrate), remembering what it did; True once the vCPU has acknowledged.

        May be called again until it returns True; STOP is reported once, if the guest ran.
        """

    def vcpu_quiet(self) -> AbstractContextManager[None]:
        """The vCPU stands still within, acknowledged; for the guest's users nothing happens."""

    def quiesce_devices(self, timeout_s: float) -> None:
        """Let the host side take what the devices have given out; FIFOs keep what they hold."""

    def resume_after_migration(self) -> None:
        """The guest stays here: back to what it did before `stop_for_migration`."""

    def set_run_state(self, new: RunState) -> None:
        """The guest is gone, or may be: postmigrate."""

    on_hand_over_soon: Callable[[], None]
    """Called while the guest still runs, on either side, ms before it changes hands: to keep out of it."""

    cont_guard: Callable[[], str | None]
    """Asked before the guest is let run by a user: why it may not; None if it may. Must not wait."""

    def stop(self, target: RunState, wait_s: float | None) -> bool:
        """Stop a guest that runs, for a reason that `target` names; False if the vCPU did not acknowledge."""

    # ---- destination ----

    def start_after_migration(self) -> None:
        """Everything is loaded: do what the guest did at the source, unless started with -S."""

    def power_off(self, exit_status: int) -> None:
        """End the process soon, with this status."""

    def forget_incoming_state(self) -> None:
        """An attempt failed: devices and CPU as if it had never been, code flushed; still inmigrate."""
