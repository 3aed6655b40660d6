"""The source: one outgoing migration, its thread, and the question whose the guest is when it ends.

Rules
1. `SourceControl.hand_over` is called once, directly before the first byte of the record that the destination
   needs in order to start. Before it, any failure or cancel gives the guest back here. After it the guest
   never runs here by itself, unless a Pageferry destination says that it did not start it.
2. The guest is given back before the status says so, so that whoever reads the status finds it running.
3. A page that is written after its last chance to be sent fails the migration: never a lost page.

The work itself is in `source_phases.py` (mig/source) and `source_return.py` (mig/return).
Source: QEMU 7.2 migration/migration.c (migrate_fd_connect, migration_iteration_finish).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from vmm.errors import PageferryError
from vmm.migration import channel as channels
from vmm.migration.converge import Decision
from vmm.migration.errors import HandOverUncertain, MigrationRefused, reason
from vmm.migration.params import Capability
from vmm.migration.source_control import SourceControl
from vmm.migration.source_phases import SourcePhases, SourceSettings
from vmm.migration.status import MigrationStatus, StatusMachine
from vmm.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.dirty_log import DirtyLog
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.stats import MigrationStats
    from vmm.migration.uri import Address

__all__ = ["Source", "SourceSettings"]

log = logging.getLogger(__name__)

LAST_WORD_MS = 500
"""How long a broken channel's return path is listened to for the reason; arbitrary."""


class Source:
    """One outgoing migration; made anew for each. `start` it once; status and stats tell the rest."""

    def __init__(
        self,
        machine: MigratableMachine,
        settings: SourceSettings,
        status: StatusMachine,
        stats: MigrationStats,
        on_pass: Callable[[int], None],
    ) -> None:
        self._machine = machine
        self._settings = settings
        self._status = status
        self._stats = stats
        self._on_pass = on_pass
        self._control = SourceControl(status)
        self._thread = threading.Thread(target=self._main, name="mig/source")
        self._connect: Callable[[], channels.Channel] | None = None
        self._channel: channels.Channel | None = None
        self._phases: SourcePhases | None = None
        self.error_text: str | None = None
        self.error: BaseException | None = None

    # ---- what the migrator calls, on any thread ----

    def start(self, address: Address, take_fd: channels.TakeFd) -> None:
        """Begin, in the background.

        Raises:
            MigrationRefused: postcopy is on, and the transport is one-way.
            MigrationError, OSError: no such descriptor, or the file or command cannot be opened.
        """

        def connect() -> channels.Channel:
            return channels.connect(address, take_fd, self._control.cancel.fd)

        if channels.is_immediate(address):
            self._channel = channel = connect()
            if self._settings.capabilities[Capability.POSTCOPY_RAM] and not channel.two_way:
                channel.abort()
                channel.close()
                raise MigrationRefused(
                    f"Postcopy needs a two-way transport such as tcp: or unix:, and {channel.name} is one-way"
                )
        self._connect = connect
        self._status.move(MigrationStatus.SETUP)
        self._thread.start()

    def cancel(self) -> None:
        """Give up and keep the guest. Nothing to do when the migration has ended.

        Raises:
            MigrationRefused: the guest is already handed over, or the migration is in postcopy.
        """
        self._control.request_cancel()

    def start_postcopy(self) -> None:
        """Switch to postcopy at the next chance; harmless when that is over."""
        self._control.request_postcopy()

    def continue_(self) -> None:
        """Leave pre-switchover."""
        self._control.request_continue()

    def abandon(self) -> None:
        """The process ends: stop the threads whatever state they are in. Follow with `join`."""
        self._control.cancel.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the threads; False after the timeout. Raises what mig/source died of: a bug of ours."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self.error is not None:
            raise self.error
        return not self._thread.is_alive()

    @property
    def sender(self) -> PageSender | None:
        """The page maps and counters, once there are any."""
        return self._phases.sender if self._phases else None

    @property
    def dirty_log(self) -> DirtyLog | None:
        """The dirty log in use: its rung, and the better ones it passed over."""
        return self._phases.dirty_log if self._phases else None

    # ---- mig/source ----

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            self._migrate()
        except BaseException as raised:
            error = raised
        try:
            self._end(error)
        except BaseException as raised:
            log.exception("mig/source could not end its migration")
            self.error = raised

    def _migrate(self) -> None:
        if self._channel is None:
            assert self._connect is not None, "start() was called"
            self._channel = self._connect()
        phases = SourcePhases(
            self._machine, self._settings, self._control, self._stats, self._on_pass, self._channel
        )
        self._phases = phases
        phases.set_up()
        self._status.move(MigrationStatus.ACTIVE)
        if phases.precopy() is Decision.START_POSTCOPY:
            phases.postcopy()
        else:
            phases.switch_over()
        if phases.return_path is not None:
            phases.return_path.wait_shut(self._control.cancel.fd)
        self._channel.finish(self._control.cancel.fd)
        if self._channel.is_withheld:
            self._control.hand_over(self._channel.publish)

    # ---- the end ----

    def _end(self, error: BaseException | None) -> None:
        """Settle who owns the guest, clean up, then say so (rule 2)."""
        phases, did_not_start = self._phases, False
        if phases is not None:
            if error is not None and phases.return_path is not None:
                # Whoever broke the channel may have said why, or that it did not start the guest.
                error = phases.return_path.last_word(LAST_WORD_MS, self._control.cancel.fd) or error
                did_not_start = phases.return_path.destination_did_not_start
            phases.count_progress()
            phases.close()
            if error is not None and self._channel is not None:
                error = self._channel.explain(error, phases.written_bytes)
        self._stats.finished()
        self._close_channel(error)
        if error is None:
            self._machine.set_run_state(RunState.POSTMIGRATE)
            self._status.move(MigrationStatus.COMPLETED)
            return
        if not isinstance(error, PageferryError | OSError):
            self.error = error
            log.error("mig/source failed", exc_info=error)
        is_ours = not self._control.handed_over or did_not_start
        if is_ours and phases is not None and phases.guest_stopped:
            self._stats.guest_resumed()
            self._machine.resume_after_migration()
        self._report_failure(error, is_ours)

    def _report_failure(self, error: BaseException, is_ours: bool) -> None:
        self.error_text = reason(error)
        if is_ours:
            if not self._control.end_here():
                log.error("migration failed, the guest stays here: %s", self.error_text)
        elif self._status.move(MigrationStatus.POSTCOPY_PAUSED, only_from=MigrationStatus.POSTCOPY_ACTIVE):
            log.error("postcopy paused: %s", self.error_text)
        else:
            uncertain = HandOverUncertain(
                f"{self.error_text}; the destination may run the guest, so it stays paused here "
                "('cont' runs it here: only if it does not run there)"
            )
            self.error_text = str(uncertain)
            log.error("%s", uncertain)
            self._machine.set_run_state(RunState.POSTMIGRATE)
            self._status.move(MigrationStatus.FAILED)

    def _close_channel(self, error: BaseException | None) -> None:
        if self._channel is None:
            return
        if error is not None:
            with contextlib.suppress(PageferryError, OSError):
                self._channel.abort()
        self._channel.close()
