"""The source: mig/source sends a guest away, pass by pass, and hands it over at one point.

    migrate -> mig/source: connect, set-up, arm the dirty log
                 iterate | sync  until `converge` says so
                 switch over:  guest stopped - last sync - last pages - devices - nothing dirty? - EOF
                 postcopy:     guest stopped - last sync - discards - nothing dirty? - package - pages - END
               mig/return: page requests (in C) and the destination's last word

Rules
1. `_hand_over` is called once, directly before the first byte of the record that the destination needs in
   order to start. Before it, any failure or cancel gives the guest back here. After it the guest never runs
   here by itself, unless a Pageferry destination says that it did not start it.
2. The guest is given back before the status says so, so that whoever reads the status finds it running.
3. A page that is dirty after its last chance to be sent fails the migration: never a lost page.

Source: QEMU 7.2 migration/migration.c (migration_thread, migration_completion, postcopy_start).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.errors import MigrationError, PageferryError
from vmm.migration import channel as channels
from vmm.migration.bitmap import Bitmap
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent, KickEvent
from vmm.migration.converge import Decision, Figures, decide, expected_downtime_ms
from vmm.migration.device_state import DeviceState
from vmm.migration.dirty_log import open_dirty_log
from vmm.migration.errors import Cancelled, HandOverUncertain, MigrationRefused, reason
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.params import Capability
from vmm.migration.rate_limit import RateLimit
from vmm.migration.source_return import ReturnPathThread
from vmm.migration.source_stream import POSTCOPY_BATCH_PAGES, SourceStream
from vmm.migration.status import MigrationStatus, StatusMachine
from vmm.migration.stream import Configuration
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.dirty_log import DirtyLog
    from vmm.migration.faults import TestFault
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.params import Capabilities, Parameters
    from vmm.migration.stats import MigrationStats
    from vmm.migration.uri import Address

__all__ = ["Source", "SourceSettings"]

log = logging.getLogger(__name__)

ITERATION_S = 0.05
"""One section lasts this long at most: then the user's wishes and the rate are looked at (QEMU: MAX_WAIT)."""

SLICE_PAGES = 256
"""Pages sent between two looks at the clock: 1 MiB."""

QUIESCE_TIMEOUT_S = 1.0
"""How long the host side of a device may take to swallow what the guest has written; arbitrary."""

LAST_WORD_MS = 500
"""How long a broken channel's return path is listened to for the reason; arbitrary."""


@dataclass(frozen=True)
class SourceSettings:
    """What was set when the migration began; `parameters` may change while it runs."""

    capabilities: Capabilities
    parameters: Parameters
    fault: TestFault


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
        self._cancel = CancelEvent()
        self._return_cancel = CancelEvent()
        self._kick = KickEvent()
        self._postcopy_wanted = False
        self._continue_wanted = False
        self._lock = threading.Lock()  # orders a cancel and the hand-over: one of them comes first
        self._handed_over = False
        self._rate = RateLimit(time.monotonic())
        self._thread = threading.Thread(target=self._main, name="mig/source")
        self._guest_stopped = False
        self._bitmap_is_exact = True
        self._counted_bytes = 0
        self._pushed_in_precopy = 0
        self._channel: channels.Channel | None = None
        self._stream: SourceStream | None = None
        self._log: DirtyLog | None = None
        self._return_path: ReturnPathThread | None = None
        self.error_text: str | None = None
        self.error: BaseException | None = None

    # ---- what the migrator calls, on any thread ----

    def start(self, address: Address, take_fd: channels.TakeFd) -> None:
        """Begin, in the background.

        Raises:
            MigrationRefused: postcopy is on, and the transport is one-way.
            MigrationError, OSError: no such descriptor, or the file or command cannot be opened.
        """
        self._connect = lambda: channels.connect(address, take_fd, self._cancel.fd)
        if channels.is_immediate(address):
            channel = self._connect()
            self._connect = lambda: channel
            if self._settings.capabilities[Capability.POSTCOPY_RAM] and not channel.two_way:
                channel.abort()
                channel.close()
                raise MigrationRefused(
                    f"Postcopy needs a two-way transport such as tcp: or unix:, and {channel.name} is one-way"
                )
        self._status.move(MigrationStatus.SETUP)
        self._thread.start()

    def abandon(self) -> None:
        """The process ends: stop the threads whatever state they are in. Follow with `join`."""
        self._cancel.set()

    def cancel(self) -> None:
        """Give up and keep the guest. Nothing to do when the migration has ended.

        Raises:
            MigrationRefused: the guest is already handed over, or the migration is in postcopy.
        """
        with self._lock:
            status = self._status.status
            if not self._status.is_in_progress or status is MigrationStatus.CANCELLING:
                return
            if self._handed_over or status is MigrationStatus.POSTCOPY_ACTIVE:
                raise MigrationRefused("Postcopy migration in progress, cannot cancel.")
            self._status.move(MigrationStatus.CANCELLING)
            self._cancel.set()

    def start_postcopy(self) -> None:
        """Switch to postcopy at the next chance; harmless when that is over."""
        self._postcopy_wanted = True
        self._kick.kick()

    def continue_(self) -> None:
        """Leave pre-switchover."""
        self._continue_wanted = True
        self._kick.kick()

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
        return self._stream.sender if self._stream else None

    @property
    def dirty_log(self) -> DirtyLog | None:
        """The dirty log in use: its rung, and the better ones it passed over."""
        return self._log

    # ---- mig/source ----

    def _main(self) -> None:
        try:
            self._migrate()
            outcome: BaseException | None = None
        except Exception as error:
            outcome = error
        try:
            self._end(outcome)
        except BaseException as error:
            log.exception("mig/source failed")
            self.error = error

    def _migrate(self) -> None:
        self._channel = channel = self._connect()
        self._set_up(channel)
        self._status.move(MigrationStatus.ACTIVE)
        if self._precopy() is Decision.START_POSTCOPY:
            self._postcopy()
        else:
            self._switch_over(channel)
        if self._return_path is not None:
            self._return_path.wait_shut(self._cancel.fd)
        channel.finish()

    def _set_up(self, channel: channels.Channel) -> None:
        machine, capabilities = self._machine, self._settings.capabilities
        writer = StreamWriter(channel.write_fd, self._cancel.fd)
        self._stream = stream = SourceStream(machine.ram, writer)
        if channel.two_way:
            reader = StreamReader(channel.read_fd, self._return_cancel.fd)
            self._return_path = ReturnPathThread(stream.sender, reader, on_error=channel.shutdown)
            self._return_path.start()
        dirty_log = open_dirty_log(machine.ram, machine.cpu_log, machine.dirty_log_rung)
        populated = dirty_log.start()
        self._log = dirty_log
        for name, bitmap in populated.items():
            stream.sender.populated[name].or_(bitmap)
            stream.sender.dirty[name].fill(True)
        self._on_pass(self._stats.synced(0, stream.sender.dirty_count() * PAGE_SIZE_BYTES))
        stream.begin(
            Configuration(machine.machine_type_name, uuid=self._uuid()),
            return_path=channel.two_way,
            advise=capabilities[Capability.POSTCOPY_RAM],
        )
        self._count_progress()
        self._stats.setup_done()

    def _uuid(self) -> bytes | None:
        uuid = self._machine.uuid
        wanted = self._settings.capabilities[Capability.VALIDATE_UUID]
        return uuid.bytes if wanted and uuid is not None else None

    def _sync(self) -> None:
        """Bitmap sync: what was written since the last one is dirty, and no longer known to be zero."""
        assert self._log is not None
        sender = self._open_stream.sender
        written = {name: Bitmap(bitmap.pages) for name, bitmap in sender.dirty.items()}
        new = self._log.sync(written)
        for name, bitmap in written.items():
            sender.dirty[name].or_(bitmap)
            sender.populated[name].or_(bitmap)
        self._bitmap_is_exact = True
        self._on_pass(self._stats.synced(new, sender.dirty_count() * PAGE_SIZE_BYTES))

    def _count_progress(self) -> None:
        """Bring what the page pump and the channel have counted into the statistics."""
        pump = self._open_stream.sender.struct
        self._stats.add_bytes(self._open_stream.total_bytes - self._counted_bytes)
        self._counted_bytes = self._open_stream.total_bytes
        self._stats.set(
            normal_pages=pump.normal_pages,
            zero_pages=pump.zero_pages,
            postcopy_requests=pump.requests,
            requested_pages=pump.requested_pages,
            resent_pages=pump.resent_pages,
            pushed_pages=pump.pushed_pages - self._pushed_in_precopy,
        )
        self._stats.set_remaining(self._open_stream.sender.dirty_count() * PAGE_SIZE_BYTES)
        self._stats.tick()

    def _figures(self) -> Figures:
        now, parameters = self._stats.snapshot(), self._settings.parameters
        figures = Figures(
            remaining_bytes=now.remaining_bytes,
            remaining_is_exact=self._bitmap_is_exact,
            bandwidth_bytes_per_s=now.bandwidth_bytes_per_s,
            dirty_rate_bytes_per_s=now.dirty_rate_bytes_per_s,
            downtime_limit_ms=parameters.downtime_limit_ms,
            elapsed_ms=now.total_time_ms,
            postcopy_enabled=self._settings.capabilities[Capability.POSTCOPY_RAM],
            postcopy_requested=self._postcopy_wanted,
            postcopy_start_time_ms=parameters.postcopy_start_time_ms,
        )
        self._stats.set_expected_downtime(expected_downtime_ms(figures))
        return figures

    @property
    def _open_stream(self) -> SourceStream:
        assert self._stream is not None, "set-up is over"
        return self._stream

    # ---- precopy ----

    def _precopy(self) -> Decision:
        """Pass after pass; returns SWITCH_OVER or START_POSTCOPY."""
        while True:
            self._check_cancelled()
            self._count_progress()
            verdict = decide(self._figures())
            match verdict.decision:
                case Decision.SYNC:
                    self._sync()
                case Decision.ITERATE:
                    self._bitmap_is_exact = False
                    self._open_stream.part(self._send_slices)
                    self._wait_for_budget(self._settings.parameters.max_bandwidth_bytes_per_s)
                case Decision.GIVE_UP:
                    raise MigrationError(f"Given up: {verdict.reason}")
                case decision:
                    log.info("%s: %s", decision.value, verdict.reason)
                    return decision

    def _check_cancelled(self) -> None:
        if self._cancel.is_set:
            raise Cancelled()

    def _send_slices(self, sender: PageSender) -> None:
        """As much as one section takes: until the budget, the time, or the dirty pages are used up."""
        limit = self._settings.parameters.max_bandwidth_bytes_per_s
        end_s = time.monotonic() + ITERATION_S
        self._send_until(sender, end_s, limit, batch=64)

    def _send_until(self, sender: PageSender, end_s: float, limit: int, batch: int) -> None:
        while (now_s := time.monotonic()) < end_s:
            budget = self._rate.budget_bytes(now_s, limit)
            pages = SLICE_PAGES if budget is None else min(SLICE_PAGES, -(-budget // PAGE_SIZE_BYTES))
            before = self._open_stream.total_bytes
            sent = sender.send(pages, batch=batch) if pages else 0
            self._rate.spend(self._open_stream.total_bytes - before)
            if sent < SLICE_PAGES:
                return

    def _wait_for_budget(self, limit: int) -> None:
        """Sleep to the end of the window if its bytes are spent; a user's wish ends the sleep."""
        now_s = time.monotonic()
        if self._rate.budget_bytes(now_s, limit) == 0 and self._open_stream.sender.dirty_count():
            wait_fd(self._kick.fd, self._cancel.fd, int(self._rate.wait_s(now_s) * 1000) + 1)
            self._kick.take()

    def _stop_guest(self) -> None:
        """Stop the vCPU, acknowledged, and quiesce the devices; FIFOs keep what they hold."""
        self._count_progress()
        self._stats.guest_stopped()
        self._guest_stopped = True
        while not self._machine.stop_for_migration(wait_s=0.05):
            self._check_cancelled()
        self._machine.quiesce_devices(QUIESCE_TIMEOUT_S)

    def _switch_over(self, channel: channels.Channel) -> None:
        """The end of precopy (design rule 10)."""
        stream = self._open_stream
        self._stop_guest()
        if self._settings.capabilities[Capability.PAUSE_BEFORE_SWITCHOVER]:
            self._pause_before_switchover()
        self._sync()
        self._settings.fault.before_last_pages(stream.sender)
        stream.last_pages()
        devices = DeviceState(self._machine.sections())
        stream.devices(devices)
        self._check_unchanged()
        self._hand_over()
        stream.eof(devices.vmdescription())

    def _pause_before_switchover(self) -> None:
        self._status.move(MigrationStatus.PRE_SWITCHOVER)
        while not self._continue_wanted:
            wait_fd(self._kick.fd, self._cancel.fd)
            self._kick.take()
        self._status.move(MigrationStatus.DEVICE)

    def _check_unchanged(self) -> None:
        """One more scan: a page written after the last sync would be lost."""
        assert self._log is not None
        written = {name: Bitmap(bitmap.pages) for name, bitmap in self._open_stream.sender.dirty.items()}
        self._log.sync(written)
        pages = sum(bitmap.count() for bitmap in written.values())
        if pages:
            raise MigrationError(f"{pages} pages were written after the guest had been stopped")

    def _hand_over(self) -> None:
        with self._lock:
            self._check_cancelled()
            self._handed_over = True
        log.info("hand-over: from here on the destination may run the guest")

    # ---- postcopy ----

    def _postcopy(self) -> None:
        stream, sender = self._open_stream, self._open_stream.sender
        with self._lock:
            self._check_cancelled()
            self._status.move(MigrationStatus.POSTCOPY_ACTIVE)
        self._stop_guest()
        self._sync()
        self._settings.fault.before_last_pages(sender)
        self._discard(sender)
        devices = DeviceState(self._machine.sections())
        stream.before_package()
        package = stream.package(devices)
        self._check_unchanged()
        self._hand_over()
        stream.send_package(package)
        self._count_progress()
        self._pushed_in_precopy = sender.struct.pushed_pages
        self._stats.switched_over()
        self._send_rest(sender)
        self._check_unchanged()
        stream.last_pages()
        stream.eof(None)

    def _discard(self, sender: PageSender) -> None:
        """Every page that is not up to date at the destination: dirty, or never sent."""
        stale = {name: bitmap.copy() for name, bitmap in sender.dirty.items()}
        sent_and_dirty = 0
        for name, bitmap in stale.items():
            masked = sender.sent[name].copy()  # the founding document's sentmap &= migrationbitmap
            masked.and_(bitmap)
            sent_and_dirty += masked.count()
            bitmap.ornot(sender.sent[name])
        self._settings.fault.before_discard(sender, stale)
        self._stats.set(discarded_pages=self._open_stream.discard(stale), stale_pages=sent_and_dirty)

    def _send_rest(self, sender: PageSender) -> None:
        """Requested pages first, the others behind them, until none is dirty."""
        while sender.dirty_count():
            self._open_stream.part(self._send_postcopy)
            self._count_progress()

    def _send_postcopy(self, sender: PageSender) -> None:
        limit = self._settings.parameters.max_postcopy_bandwidth_bytes_per_s
        now_s = time.monotonic()
        if self._rate.budget_bytes(now_s, limit) == 0:
            sender.wait_for_request(self._cancel.fd, int(self._rate.wait_s(now_s) * 1000) + 1)
            sender.send(SLICE_PAGES, batch=POSTCOPY_BATCH_PAGES, requests_only=True)
            return
        self._send_until(sender, now_s + ITERATION_S, limit, POSTCOPY_BATCH_PAGES)

    # ---- the end ----

    def _end(self, error: BaseException | None) -> None:
        """Settle who owns the guest, clean up, then say so (rule 2)."""
        if error is not None and self._return_path is not None:
            # Whoever broke the channel may have said why, or that it did not start the guest.
            error = self._return_path.last_word(LAST_WORD_MS, self._cancel.fd) or error
        returned = self._return_path is not None and self._return_path.destination_did_not_start
        is_ours = error is not None and (not self._handed_over or returned)
        if self._stream is not None:
            self._count_progress()
        self._stats.finished()
        self._clean_up(error)
        if error is None:
            self._machine.finish_migration()
            self._status.move(MigrationStatus.COMPLETED)
            return
        if not isinstance(error, PageferryError | OSError):
            log.error("mig/source failed", exc_info=error)
        if is_ours and self._guest_stopped:
            self._stats.guest_resumed()
            self._machine.resume_after_migration()
        if self._status.move(MigrationStatus.CANCELLED, only_from=MigrationStatus.CANCELLING):
            return
        self._report_failure(error, is_ours)

    def _report_failure(self, error: BaseException, is_ours: bool) -> None:
        self.error_text = reason(error)
        if is_ours:
            log.error("migration failed, the guest stays here: %s", self.error_text)
            self._status.move(MigrationStatus.FAILED)
        elif self._status.move(MigrationStatus.POSTCOPY_PAUSED, only_from=MigrationStatus.POSTCOPY_ACTIVE):
            log.error("postcopy paused: %s", self.error_text)
        else:
            uncertain = HandOverUncertain(
                f"{reason(error)}; the destination may run the guest, so it stays paused here "
                "('cont' runs it here: only if it does not run there)"
            )
            self.error_text = str(uncertain)
            log.error("%s", uncertain)
            self._machine.finish_migration()
            self._status.move(MigrationStatus.FAILED)

    def _clean_up(self, error: BaseException | None) -> None:
        if self._log is not None:
            self._log.stop()
        self._return_cancel.set()
        if self._return_path is not None:
            self._return_path.join()
        if self._channel is not None:
            if error is not None:
                with contextlib.suppress(PageferryError, OSError):
                    self._channel.abort()
            self._channel.close()
