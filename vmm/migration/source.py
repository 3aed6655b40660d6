"""The source: one outgoing migration, its thread, and the question whose the guest is when it ends.

    set up - precopy - hand-over - the rest - completed
                           |          |
              cut: postcopy-paused <--+<-------------------+
                           | migrate resume                |
                           +---> ask, agree, the rest -----+ cut
                                  |
                                  +---> it did not start there: the guest is ours again

Rules
1. The hand-over (`source_hand_over.py`) happens once. Before it any failure or cancel gives the guest back
   here. After it the guest never runs here by itself, unless a Pageferry destination says that it did not
   start it.
2. The guest is given back before the status says so, so that whoever reads the status finds it running.
3. A page that is written after its last chance to be sent fails the migration: never a lost page.
4. While it is paused everything is kept: RAM, maps, the dirty log, and this thread, which waits for a way
   back.

The work itself is in `source_phases.py` (mig/source) and `source_return.py` (mig/return).
Source: QEMU 7.2 migration/migration.c (migrate_fd_connect, migration_iteration_finish).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from vmm.errors import PageferryError
from vmm.migration import channel as channels
from vmm.migration.compression import why_not
from vmm.migration.converge import Decision
from vmm.migration.errors import (
    DidNotStart,
    HandOverUncertain,
    MigrationError,
    MigrationRefused,
    PeerError,
    TakenBack,
    reason,
)
from vmm.migration.params import Capability
from vmm.migration.peer import Fate
from vmm.migration.source_control import SourceControl
from vmm.migration.source_phases import SourcePhases, SourceSettings
from vmm.migration.status import MigrationStatus, StatusMachine
from vmm.migration.uri import ExecAddress, FileAddress
from vmm.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.dirty_log import DirtyLog
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.source_return import ReturnPathThread
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
        self._thread: threading.Thread | None = None
        self._connect: Callable[[], channels.Channel] | None = None
        self._way: tuple[Address, channels.TakeFd] | None = None
        self._channel: channels.Channel | None = None
        self._channel_lock = threading.Lock()  # protects `_channel` while a shutdown may meet its close
        self._is_ours_again = False
        self._has_started = False  # the destination has said so, on this channel or an earlier one
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
            patience = self._settings.parameters.patience()
            return channels.connect(address, take_fd, self._control.cancel.fd, patience.peer_ms)

        self._way = (address, take_fd)
        if channels.is_immediate(address):
            self._check_one_channel()
            self._channel = channel = connect()
            if self._settings.capabilities[Capability.POSTCOPY_RAM] and not channel.two_way:
                channel.abort()
                channel.close()
                raise MigrationRefused(
                    f"Postcopy needs a two-way transport such as tcp: or unix:, and {channel.name} is one-way"
                )
        else:
            self._connect = connect
        self._status.move(MigrationStatus.SETUP)
        self._thread = threading.Thread(target=self._main, name="mig/source")
        self._thread.start()

    def _check_one_channel(self) -> None:
        if self._settings.capabilities[Capability.MULTIFD]:
            raise MigrationRefused("multifd is not supported by current protocol")
        if self._settings.capabilities[Capability.POSTCOPY_PREEMPT]:
            raise MigrationRefused("Migration requires multi-channel URIs (e.g. tcp)")

    def _open_others(self, channel: channels.Channel) -> None:
        """multifd, postcopy-preempt: directly after the first, before a byte is written.

        Raises:
            OSError, Cancelled: as `channels.connect`.
            MigrationError: this host cannot compress so.
        """
        settings = self._settings
        if settings.capabilities[Capability.POSTCOPY_PREEMPT]:
            channel.second = self._connect_another()
        if settings.capabilities[Capability.MULTIFD]:
            reason = why_not(settings.parameters["multifd-compression"])
            if reason is not None:
                raise MigrationError(reason)
            for _ in range(settings.parameters["multifd-channels"]):
                channel.more.append(self._connect_another())

    def _connect_another(self) -> channels.Channel:
        assert self._way is not None, "whoever connects says how"
        peer_ms = self._settings.parameters.patience().peer_ms
        return channels.connect(*self._way, self._control.cancel.fd, peer_ms)

    def cancel(self) -> None:
        """Give up and keep the guest. Nothing to do when the migration has ended.

        Raises:
            MigrationRefused: the guest is already handed over; says what to do instead.
        """
        self._control.request_cancel()

    def start_postcopy(self) -> None:
        """Switch to postcopy at the next chance; harmless when that is over."""
        self._control.request_postcopy()

    def continue_(self) -> None:
        """Leave pre-switchover."""
        self._control.request_continue()

    def pause(self) -> None:
        """Break the channel; the status says soon what that means."""
        self._cut()

    def resume(self, address: Address, take_fd: channels.TakeFd) -> None:
        """Go on with a paused migration over a new channel, in the background.

        Raises:
            MigrationRefused: it is not paused, or the transport is one-way.
            MigrationError, OSError: no such descriptor.
        """

        def connect(cancel_fd: int) -> channels.Channel:
            self._way = (address, take_fd)
            patience = self._settings.parameters.patience()
            return channels.connect(address, take_fd, cancel_fd, patience.peer_ms)

        if isinstance(address, ExecAddress | FileAddress):
            raise MigrationRefused("Recovery needs a two-way transport such as tcp: or unix:")
        if not channels.is_immediate(address):
            self._control.request_resume(connect)
            return
        self._check_one_channel()
        channel = connect(self._control.cancel.fd)
        try:
            if not channel.two_way:
                raise MigrationRefused(f"Recovery needs a two-way transport, and {channel.name} is one-way")
            self._control.request_resume(lambda _cancel_fd: channel)
        except MigrationRefused:
            channel.close()
            raise

    def take_back(self) -> None:
        """The user says that the destination is gone for good: from now on `cont` may run the guest here.

        Raises:
            MigrationRefused: the guest was not handed over, the connection stands, or its RAM was released.
        """
        if self.cont_refusal is None:
            raise MigrationRefused("The guest was not handed over to another machine")
        if self._phases is not None and self._phases.release.pages:
            raise MigrationRefused("Its RAM was given back here (release-ram); it cannot run again")
        if self._status.status is MigrationStatus.POSTCOPY_PAUSED:
            self._control.request_take_back()
        elif self._status.is_in_progress:
            raise MigrationRefused("The destination is connected; it is not gone")
        else:
            self._is_ours_again = True

    @property
    def cont_refusal(self) -> str | None:
        """Why the guest may not run here; None if it may. Any thread, at once."""
        channel = self._channel
        if not self._control.handed_over or self._is_ours_again or channel is None or not channel.two_way:
            return None
        return (
            f"The guest was handed over to {channel.name} and may run there. If that is gone for good, "
            "x-migrate-take-back allows it here; what it did there is lost then"
        )

    def abandon(self) -> None:
        """The process ends: stop the threads whatever state they are in. Follow with `join`."""
        self._control.abandon()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the threads; False after the timeout. Raises what mig/source died of: a bug of ours."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self.error is not None:
            raise self.error
        return self._thread is None or not self._thread.is_alive()

    @property
    def sender(self) -> PageSender | None:
        """The page maps and counters, once there are any."""
        return self._phases.sender if self._phases else None

    def page_checksums(self) -> dict[str, Any] | None:
        """See `PageChecks.query`; None before there is a channel."""
        return self._phases.checks.query() if self._phases else None

    @property
    def dirty_log(self) -> DirtyLog | None:
        """The dirty log in use: its rung, and the better ones it passed over."""
        return self._phases.dirty_log if self._phases else None

    # ---- mig/source ----

    def _main(self) -> None:
        error = _attempt(self._migrate)
        while error is not None and self._may_pause(error):
            self._pause(error)
            error = _attempt(self._resume)
        try:
            self._end(error)
        except BaseException as raised:
            log.exception("mig/source could not end its migration")
            self.error = raised
        finally:
            error = None  # its traceback leads back to this frame, and would keep descriptors open

    def _migrate(self) -> None:
        if self._channel is None:
            connect, self._connect = self._connect, None  # no cycle is left that keeps descriptors open
            assert connect is not None, "start() was called"
            self._channel = connect()
            self._open_others(self._channel)
        phases = SourcePhases(
            self._machine, self._settings, self._control, self._stats, self._on_pass, self._channel
        )
        self._phases = phases
        phases.set_up()
        self._status.move(MigrationStatus.ACTIVE)
        decision = phases.precopy()
        phases.hand_over.agree(phases.return_path)
        if decision is Decision.START_POSTCOPY:
            phases.postcopy()
            phases.send_rest()
        else:
            phases.switch_over()
        self._finish(phases, self._channel)

    def _finish(self, phases: SourcePhases, channel: channels.Channel) -> None:
        """Everything is written: wait until the destination has it."""
        if phases.return_path is not None:
            phases.return_path.wait_shut(self._control.cancel.fd)
        channel.finish(self._control.cancel.fd)
        if channel.is_withheld:
            self._control.hand_over(channel.publish)

    # ---- paused ----

    def _may_pause(self, error: BaseException) -> bool:
        """Is the guest the destination's, for all we know, with a chance to hear what became of it?"""
        phases, control = self._phases, self._control
        if phases is None or phases.return_path is None or not control.handed_over or control.cancel.is_set:
            return False
        if isinstance(error, DidNotStart | TakenBack) or self._says_it_did_not_start(phases.return_path):
            return False
        return control.is_postcopy or phases.hand_over.migration is not None

    def _says_it_did_not_start(self, return_path: ReturnPathThread) -> bool:
        return_path.last_word(LAST_WORD_MS, self._control.cancel.fd)
        self._has_started |= return_path.destination_has_started
        return return_path.destination_did_not_start and not self._has_started

    def _pause(self, error: BaseException) -> None:
        """The channel is of no use any more; keep everything else."""
        phases = self._phases
        assert phases is not None, "only a migration that has begun is paused"
        assert phases.return_path is not None, "see _may_pause"
        if not isinstance(error, PageferryError | OSError):
            self.error = error
            log.error("mig/source failed", exc_info=error)
        error = phases.return_path.last_word(0, self._control.cancel.fd) or error
        self._cut()
        phases.end_return_path()
        phases.count_progress()
        self._close_channel(error)
        self.error_text = reason(error)
        log.error("postcopy paused: %s", self.error_text)
        if self._status.status is not MigrationStatus.POSTCOPY_PAUSED:
            self._status.move(MigrationStatus.POSTCOPY_PAUSED)

    def _resume(self) -> None:
        """Once a new channel is there: what became of the guest? Then go on."""
        phases, control = self._phases, self._control
        assert phases is not None, "only a migration that has begun is resumed"
        channel = self._connect_again()
        control.begin_recover()
        with self._channel_lock:
            self._channel = channel
        self._open_others(channel)
        phases.new_channel(channel)
        fate = phases.ask_fate()
        if fate is Fate.NOT_STARTED:
            if self._has_started:
                raise PeerError(f"{channel.name} denies what it has said before: that the guest was started")
            raise DidNotStart()
        if fate is Fate.UNKNOWN:
            raise PeerError(f"{channel.name} does not know this guest")
        if fate is Fate.COMPLETE or not control.is_postcopy:
            return
        phases.resume()
        self.error_text = None
        self._status.move(MigrationStatus.POSTCOPY_ACTIVE)
        phases.send_rest()
        self._finish(phases, channel)

    def _connect_again(self) -> channels.Channel:
        """Until somebody answers. Raises TakenBack, or Cancelled when the process ends."""
        while True:
            try:
                return self._control.connect_again()
            except TakenBack:
                raise
            except (PageferryError, OSError) as error:
                self._control.check_cancelled()
                self.error_text = reason(error)
                log.warning("still paused: %s", self.error_text)

    def _cut(self) -> None:
        with self._channel_lock:
            if self._channel is not None:
                self._channel.shutdown()

    # ---- the end ----

    def _end(self, error: BaseException | None) -> None:
        """Settle who owns the guest, clean up, then say so (rule 2)."""
        phases, did_not_start = self._phases, False
        if phases is not None:
            if error is not None and phases.return_path is not None:
                # Whoever broke the channel may have said why, or that it did not start the guest.
                did_not_start = isinstance(error, DidNotStart) or self._says_it_did_not_start(
                    phases.return_path
                )
                error = phases.return_path.last_word(0, self._control.cancel.fd) or error
            phases.count_progress()
            phases.close()
            if error is not None and self._channel is not None:
                error = self._channel.explain(error, phases.written_bytes)
        self._stats.finished()
        self._close_channel(error)
        if error is None:
            if phases is not None:
                phases.spool.dismiss()
            self._machine.set_run_state(RunState.POSTMIGRATE)
            self._status.move(MigrationStatus.COMPLETED)
            return
        if not isinstance(error, PageferryError | OSError):
            self.error = error
            log.error("mig/source failed", exc_info=error)
        is_ours = not self._control.handed_over or did_not_start
        self._is_ours_again = is_ours or isinstance(error, TakenBack)
        if self._is_ours_again and phases is not None:
            phases.spool.dismiss()
        if is_ours and phases is not None and phases.guest_stopped:
            self._stats.guest_resumed()
            self._machine.resume_after_migration()
        self._report_failure(error, is_ours)

    def _report_failure(self, error: BaseException, is_ours: bool) -> None:
        self.error_text = reason(error)
        if is_ours:
            if not self._control.end_here():
                log.error("migration failed, the guest stays here: %s", self.error_text)
            return
        if not isinstance(error, TakenBack):
            uncertain = HandOverUncertain(
                f"{self.error_text}; the destination may run the guest, so it stays paused here "
                "(x-migrate-take-back allows 'cont': only if the destination is gone for good)"
            )
            self.error_text = str(uncertain)
        log.error("%s", self.error_text)
        self._machine.set_run_state(RunState.POSTMIGRATE)
        self._status.move(MigrationStatus.FAILED)

    def _close_channel(self, error: BaseException | None) -> None:
        if self._channel is None:
            return
        if error is not None:
            with contextlib.suppress(PageferryError, OSError):
                self._channel.abort()
        with self._channel_lock:
            self._channel.close()


def _attempt(step: Callable[[], None]) -> BaseException | None:
    """What `step` raised."""
    try:
        step()
    except BaseException as error:
        return error
    return None
