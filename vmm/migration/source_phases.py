"""The phases of an outgoing migration, as mig/source goes through them.

    set_up       return path open, dirty log armed, stream begun
    precopy      iterate | sync  until `converge` says so
    agree        who is the peer, and how will the guest be handed over?    (source_hand_over.py)
    switch_over  guest stopped - last sync - last pages - devices - EOF, hand-over
    postcopy     guest stopped - last sync - discards - package, hand-over
    send_rest    pages - END
    resume       on a new channel: what has it not received?                (source_recovery.py)

Any failure leaves by an exception; whose the guest is then, `source.py` decides.
Source: QEMU 7.2 migration/migration.c (migration_thread, migration_completion, postcopy_start).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.errors import MigrationError
from vmm.migration.bitmap import Bitmap
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.converge import Decision, Figures, decide, outlook
from vmm.migration.cpu_throttle import AutoConverge
from vmm.migration.device_state import DeviceState
from vmm.migration.dirty_log import open_dirty_log
from vmm.migration.page_checks import PageChecks
from vmm.migration.page_pump.multifd_send import MultifdSender
from vmm.migration.page_pump.xbzrle import XbzrleSource
from vmm.migration.params import Capability
from vmm.migration.preempt import PreemptSource
from vmm.migration.rate_limit import RateLimit
from vmm.migration.release import RamRelease
from vmm.migration.silence import BEAT_S
from vmm.migration.source_hand_over import SourceHandOver
from vmm.migration.source_recovery import agree_on_resume, ask_fate
from vmm.migration.source_return import ReturnPathThread
from vmm.migration.source_spool import SourceSpool
from vmm.migration.source_stream import POSTCOPY_BATCH_PAGES, SourceStream
from vmm.migration.status import MigrationStatus
from vmm.migration.stream import Configuration
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.channel import Channel
    from vmm.migration.dirty_log import DirtyLog
    from vmm.migration.faults import TestFault
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.kept import KeptState
    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.params import Capabilities, Parameters
    from vmm.migration.peer import Fate
    from vmm.migration.source_control import SourceControl
    from vmm.migration.stats import MigrationStats

__all__ = ["SourcePhases", "SourceSettings"]

log = logging.getLogger(__name__)

ITERATION_S = 0.05
"""One section lasts this long at most: then the user's wishes and the rate are looked at (QEMU: MAX_WAIT)."""

LOADING_WAIT_MS = 2
"""Arbitrary: how long a look for page requests takes while the destination loads the devices. A request that
comes meanwhile is answered at once; that all is loaded is seen after it."""

START_S = 0.002
"""Arbitrary: so long pages wait for the destination to say that the guest runs. A distant one is too late."""

LOOK_S = 0.002
"""Arbitrary: a wish for postcopy ends a section of precopy after so long. Much of what goes out after it
would go out again."""

SLICE_PAGES = 1 << 16
"""Pages sent between two looks at the rate, unless the time is over first."""

PRECOPY_BATCH_PAGES = 256
"""With content, to a system call: 1 MiB. Measured: more is no faster, 64 is a tenth slower."""

PRECOPY_BACKLOG_BYTES = 4 << 20
"""What may wait in the socket: both sides then run on without waking each other for every few pages."""

POSTCOPY_BACKLOG_BYTES = 128 << 10
"""A requested page waits for what is in the socket before it, so that is little. Measured together with
`POSTCOPY_BATCH_PAGES`: half of both takes 1.6 times as long in all and answers no faster, twice the backlog
takes 0.8 times as long and answers 20 us later."""

QUIESCE_TIMEOUT_S = 1.0
"""How long the host side of a device may take to swallow what the guest has written; arbitrary."""


@dataclass(frozen=True)
class SourceSettings:
    """What was set when the migration began; `parameters` may change while it runs."""

    capabilities: Capabilities
    parameters: Parameters
    kept: KeptState
    fault: TestFault


class SourcePhases:
    """What mig/source does with a connected channel; each phase is called once, in order."""

    def __init__(
        self,
        machine: MigratableMachine,
        settings: SourceSettings,
        control: SourceControl,
        stats: MigrationStats,
        on_pass: Callable[[int], None],
        channel: Channel,
    ) -> None:
        self._machine = machine
        self._settings = settings
        self._control = control
        self._stats = stats
        self._on_pass = on_pass
        self._blocks = (*machine.ram.blocks, *settings.kept.blocks)
        writer = StreamWriter(channel.write_fd, control.cancel.fd)
        self._more = channel.more
        self._multifd = self._open_multifd(writer) if channel.more else None
        self._stream = SourceStream(self._blocks, writer, self._multifd)
        self.spool = SourceSpool(settings.capabilities, settings.parameters)
        self._auto_converge = AutoConverge(machine, settings.capabilities, settings.parameters, stats)
        self._stream.limit_backlog(PRECOPY_BACKLOG_BYTES)
        self._rate = RateLimit(time.monotonic())
        self._bitmap_is_exact = True
        self._written = self._clean_maps()  # clear between bitmap syncs
        self._counted_bytes = 0
        self._pushed_in_precopy: int | None = None  # until postcopy has begun
        self._discarded = {block.name: Bitmap(block.page_count) for block in self._blocks}
        self._discarded_pages = 0
        self._return_cancel = CancelEvent()
        self.sender = self._stream.sender
        self._xbzrle = XbzrleSource(self.sender, settings.capabilities, settings.parameters, stats)
        is_released = settings.capabilities[Capability.RELEASE_RAM]
        self.checks = PageChecks(self._stream, settings.capabilities)
        self.release = RamRelease(machine.ram.blocks, self.sender, is_on=is_released)
        self.preempt = PreemptSource(self.sender, control.cancel.fd)
        self.preempt.use(channel.second)
        self.dirty_log: DirtyLog | None = None
        self.guest_stopped = False
        self._polluted: MigrationError | None = None
        self.hand_over = SourceHandOver(self._stream, control, is_withheld=channel.is_withheld)
        self.return_path = self._open_return_path(channel) if channel.two_way else None

    def _open_multifd(self, writer: StreamWriter) -> MultifdSender:
        parameters = self._settings.parameters
        method, uuid = parameters["multifd-compression"], self._machine.config.uuid
        return MultifdSender(
            self._blocks,
            writer,
            [channel.write_fd for channel in self._more],
            self._control.cancel.fd,
            method=method,
            level=0 if method == "none" else parameters[f"multifd-{method}-level"],
            uuid=None if uuid is None else uuid.bytes,
        )

    def _open_return_path(self, channel: Channel) -> ReturnPathThread:
        reader = StreamReader(channel.read_fd, self._return_cancel.fd)
        parameters = self._settings.parameters
        return ReturnPathThread(self.sender, reader, channel.shutdown, lambda: parameters.patience().peer_ms)

    def set_up(self) -> None:
        """Arm the dirty log, open the return path, say what is coming."""
        machine, stream = self._machine, self._stream
        if self.return_path is not None:
            self.return_path.start()
        self.dirty_log = open_dirty_log(machine.ram, machine.cpu_log, machine.dirty_log_rung)
        populated = self.dirty_log.start()
        for name, bitmap in populated.items():
            stream.sender.populated[name].or_(bitmap)
            stream.sender.dirty[name].fill(True)
        for block in self._settings.kept.blocks:
            stream.sender.populated[block.name].fill(True)
            stream.sender.dirty[block.name].fill(True)
        self._on_pass(self._stats.synced(0, stream.sender.dirty_count() * PAGE_SIZE_BYTES))
        stream.begin(
            Configuration(machine.machine_type_name, uuid=self._uuid()),
            return_path=self.return_path is not None,
            advise=self._settings.capabilities[Capability.POSTCOPY_RAM],
        )
        self.checks.agree(self.return_path, self._control.cancel.fd)
        self.count_progress()
        self._stats.setup_done()

    def _uuid(self) -> bytes | None:
        uuid = self._machine.config.uuid
        wanted = self._settings.capabilities[Capability.VALIDATE_UUID]
        return uuid.bytes if wanted and uuid is not None else None

    def _clean_maps(self) -> dict[str, Bitmap]:
        """For the dirty log: a clear bitmap for each block that the guest can write to."""
        return {block.name: Bitmap(block.page_count) for block in self._machine.ram.blocks}

    def _sync(self) -> None:
        """Bitmap sync: what was written since the last one is dirty, and no longer known to be zero."""
        assert self.dirty_log is not None
        sender = self.sender
        started_ns = time.monotonic_ns()
        new = self.dirty_log.sync(self._written)
        if new:
            for name, bitmap in self._written.items():
                bitmap.pour(sender.dirty[name], sender.populated[name])
        log.debug("bitmap sync: %d pages new, %d us", new, (time.monotonic_ns() - started_ns) // 1000)
        self._bitmap_is_exact = True
        self._on_pass(self._stats.synced(new, sender.dirty_count() * PAGE_SIZE_BYTES))
        self._auto_converge.synced(new)
        self._xbzrle.synced()

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken so far."""
        return self._stream.written_bytes

    def count_progress(self) -> None:
        """Bring what the page pump and the channel have counted into the statistics."""
        pump, before = self.sender.struct, self._pushed_in_precopy
        written = self._stream.total_bytes + self.preempt.total_bytes
        self._stats.add_bytes(written - self._counted_bytes)
        self._counted_bytes = written
        self._stats.set(
            normal_pages=pump.normal_pages + self.preempt.normal_pages,
            zero_pages=pump.zero_pages + self.preempt.zero_pages,
            multifd_bytes=self.sender.channel_bytes,
            postcopy_requests=pump.requests,
            requested_pages=pump.requested_pages + self.preempt.pages,
            resent_pages=pump.resent_pages,
            pushed_pages=0 if before is None else pump.pushed_pages - before,
        )
        self._stats.set_remaining(self.sender.dirty_count() * PAGE_SIZE_BYTES)
        self._stats.tick()

    def _figures(self) -> Figures:
        now, parameters = self._stats.snapshot(), self._settings.parameters
        figures = Figures(
            remaining_bytes=now.remaining_bytes,
            remaining_is_exact=self._bitmap_is_exact,
            bandwidth_bytes_per_s=self._stats.bandwidth_bytes_per_s(parameters.max_bandwidth_bytes_per_s),
            dirty_rate_bytes_per_s=now.dirty_rate_bytes_per_s,
            downtime_limit_ms=parameters.downtime_limit_ms,
            elapsed_ms=now.total_time_ms,
            postcopy_enabled=self._settings.capabilities[Capability.POSTCOPY_RAM],
            postcopy_requested=self._control.postcopy_wanted,
            postcopy_start_time_ms=parameters.postcopy_start_time_ms,
            throttle_percentage=now.throttle_percentage,
        )
        self._stats.set_outlook(outlook(figures))
        return figures

    # ---- precopy ----

    def precopy(self) -> Decision:
        """Pass after pass; returns SWITCH_OVER or START_POSTCOPY."""
        while True:
            self._control.check_cancelled()
            self.count_progress()
            verdict = decide(self._figures())
            match verdict.decision:
                case Decision.SYNC:
                    self._sync()
                case Decision.ITERATE:
                    self._bitmap_is_exact = False
                    self._stream.part(self._send_slices)
                    self._wait_for_budget(self._settings.parameters.max_bandwidth_bytes_per_s)
                case Decision.GIVE_UP:
                    raise MigrationError(f"Given up: {verdict.reason}")
                case decision:
                    log.info("%s: %s", decision.value, verdict.reason)
                    return decision

    def _send_slices(self, sender: PageSender) -> None:
        """As much as one section takes: until the budget, the time, or the dirty pages are used up."""
        limit = self._settings.parameters.max_bandwidth_bytes_per_s
        end_s, is_known = time.monotonic() + ITERATION_S, self._control.postcopy_wanted
        while (now_s := time.monotonic()) < end_s and self._control.postcopy_wanted == is_known:
            if not self._send_until(sender, min(now_s + LOOK_S, end_s), limit, PRECOPY_BATCH_PAGES):
                return

    def _send_until(self, sender: PageSender, end_s: float, limit: int, batch: int) -> bool:
        """True when the time is over, False when the budget or the dirty pages are used up before."""
        while (now_s := time.monotonic()) < end_s:
            budget = self._rate.budget_bytes(now_s, limit)
            pages = SLICE_PAGES if budget is None else min(SLICE_PAGES, -(-budget // PAGE_SIZE_BYTES))
            before = self._stream.total_bytes
            sent = sender.send(pages, batch=batch, until_s=end_s) if pages else 0
            self._rate.spend(self._stream.total_bytes - before)
            if not pages or (sent < pages and time.monotonic() < end_s):
                return False
        return True

    def _wait_for_budget(self, limit: int) -> None:
        """Sleep to the end of the window if its bytes are spent; a user's wish ends the sleep."""
        now_s = time.monotonic()
        if self._rate.budget_bytes(now_s, limit) == 0 and self.sender.dirty_count():
            self._control.wait_for_wish(int(self._rate.wait_s(now_s) * 1000) + 1)

    def _prepare_stop(self) -> None:
        """While the guest runs: what takes time only once."""
        self._machine.on_hand_over_soon()
        DeviceState(self._machine.sections(), self._settings.kept).prepare()

    def _stop_guest(self) -> None:
        """Stop the vCPU, acknowledged, and quiesce the devices; FIFOs keep what they hold."""
        self.count_progress()
        self._stats.guest_stopped()
        self.guest_stopped = True
        while not self._machine.stop_for_migration(wait_s=0.05):
            self._control.check_cancelled()
        self._auto_converge.end()
        self._machine.quiesce_devices(QUIESCE_TIMEOUT_S)

    def switch_over(self) -> None:
        """The end of precopy: what is left, device state, and the guest is the destination's."""
        stream = self._stream
        self._prepare_stop()
        self._stop_guest()
        if self._settings.capabilities[Capability.PAUSE_BEFORE_SWITCHOVER]:
            self._wait_for_continue()
            self._control.status.move(MigrationStatus.DEVICE)
        self._sync()
        self._settings.fault.before_last_pages(stream.sender)
        stream.last_pages()
        self._xbzrle.end()
        devices = DeviceState(self._machine.sections(), self._settings.kept)
        stream.devices(devices)
        description = devices.vmdescription()
        self.hand_over.give(lambda: stream.eof(description), self._check_unchanged, self.return_path)

    def _wait_for_continue(self) -> None:
        self._control.status.move(MigrationStatus.PRE_SWITCHOVER)
        while not self._control.continue_wanted:
            self._control.wait_for_wish(int(BEAT_S * 1000))
            if self.return_path is not None and self.return_path.peer_is_pageferry:
                self._stream.beat()

    def _check_unchanged(self) -> None:
        """One more scan: a page written after the last sync would be lost. It is not forgiven later."""
        assert self.dirty_log is not None
        if self._polluted is not None:
            raise self._polluted
        written = self._clean_maps()
        self.dirty_log.sync(written)
        self.release.without(written)
        pages = sum(bitmap.count() for bitmap in written.values())
        if pages:
            self._polluted = MigrationError(f"{pages} pages were written after the guest had been stopped")
            raise self._polluted

    # ---- postcopy ----

    def postcopy(self) -> None:
        """Hand the guest over; what is left goes after it, by `send_rest`."""
        stream, sender = self._stream, self.sender
        pausing = self._settings.capabilities[Capability.PAUSE_BEFORE_SWITCHOVER]
        stream.shorten_backlog(POSTCOPY_BACKLOG_BYTES)  # while the guest still runs
        if not pausing:
            self._control.begin_postcopy()
        self._xbzrle.end()
        self._prepare_stop()
        self._sync()
        self._discard(sender)  # while the guest runs: what it writes to again needs no second one
        assert self.return_path is not None, "there is no postcopy without one"
        if not pausing:  # who has answered is armed: the package must not be long in coming then
            stream.ping_discarded()
            self.return_path.wait_discarded(self._control.cancel.fd)
        self._stop_guest()
        if pausing:  # as QEMU's postcopy_start: still to be cancelled, and postcopy-active only after it
            self._wait_for_continue()
            self._control.begin_postcopy()
        self._sync()
        self._settings.fault.before_last_pages(sender)
        self._discard(sender)
        migration = self.hand_over.migration
        devices = DeviceState(self._machine.sections(), self._settings.kept)
        if migration is None:
            stream.ping_discarded()
        package = stream.package(devices, pings=migration is None)

        def send_package() -> None:
            if migration is None:  # the package is the hand-over
                self.spool.keep(None, self._blocks, sender)
            stream.send_package(package)
            if migration is not None:
                self.spool.keep(migration, self._blocks, sender)  # while the destination loads it

        self.hand_over.give(send_package, self._check_unchanged, self.return_path, self._serve_devices)
        self.count_progress()
        self._pushed_in_precopy = sender.struct.pushed_pages
        self._stats.switched_over()
        self.preempt.start()

    def _discard(self, sender: PageSender) -> None:
        """Every page that is not up to date at the destination and still there: dirty, or never sent."""
        stale, sent_and_dirty = {}, 0
        for name, dirty in sender.dirty.items():
            masked = sender.sent[name].copy()  # the founding document's sentmap &= migrationbitmap
            masked.and_(dirty)
            sent_and_dirty += masked.count()
            stale[name] = dirty.copy()
            stale[name].ornot(sender.sent[name])
            stale[name].andnot(self._discarded[name])
            self._discarded[name].or_(stale[name])
        self._settings.fault.before_discard(sender, stale)
        self._discarded_pages += self._stream.discard(stale)
        self._stats.set(discarded_pages=self._discarded_pages, stale_pages=sent_and_dirty)
        self.checks.confirm(self._discarded)

    def _serve_devices(self) -> None:
        """Pages that the destination's devices read while they load: the rings of virtio queues."""
        self._stream.part(self._send_to_devices)

    def _send_to_devices(self, sender: PageSender) -> None:
        sender.wait_for_request(self._control.cancel.fd, LOADING_WAIT_MS)
        sender.send(SLICE_PAGES, batch=POSTCOPY_BATCH_PAGES, requests_only=True)

    def send_rest(self) -> None:
        """Requested pages first, the others behind them, until none is dirty; then the end of the stream."""
        assert self.return_path is not None, "there is no postcopy without one"
        if self.hand_over.migration is not None:
            self._stream.part(self._let_it_start)
        while self.sender.dirty_count():
            self.return_path.check()
            self._stream.part(self._send_postcopy)
            self.count_progress()
            self.release.step(self._stream, self.return_path)
        self._check_unchanged()
        self.preempt.end()
        self._stream.last_pages()
        self._stream.eof(None)

    def _let_it_start(self, sender: PageSender) -> None:
        """Send only what is asked for: a flood of pages takes a core from whoever starts the guest there."""
        assert self.return_path is not None, "there is no postcopy without one"
        end_s = time.monotonic() + START_S
        while not self.return_path.destination_has_started and time.monotonic() < end_s:
            self._send_to_devices(sender)

    def _send_postcopy(self, sender: PageSender) -> None:
        limit = self._settings.parameters.max_postcopy_bandwidth_bytes_per_s
        now_s = time.monotonic()
        if self._rate.budget_bytes(now_s, limit) == 0:
            sender.wait_for_request(self._control.cancel.fd, int(self._rate.wait_s(now_s) * 1000) + 1)
            sender.send(SLICE_PAGES, batch=POSTCOPY_BATCH_PAGES, requests_only=True)
            return
        self._send_until(sender, now_s + ITERATION_S, limit, POSTCOPY_BATCH_PAGES)

    # ---- recovery ----

    def end_return_path(self) -> None:
        """The channel is of no use any more: nobody reads from it after this."""
        self._return_cancel.set()
        if self.return_path is not None:
            self.return_path.join()
        self.preempt.close()

    def new_channel(self, channel: Channel) -> None:
        """Go on over another channel, with a return path of its own; `end_return_path` was called."""
        self._stream.new_channel(StreamWriter(channel.write_fd, self._control.cancel.fd))
        self._stream.limit_backlog(POSTCOPY_BACKLOG_BYTES)
        self.preempt.use(channel.second)
        self.release.new_channel()
        self._counted_bytes = self.preempt.total_bytes
        self._return_cancel = CancelEvent()
        self.return_path = self._open_return_path(channel)
        self.return_path.start()

    def ask_fate(self) -> Fate:
        """What became of the guest? See `source_recovery.ask_fate`."""
        assert self.return_path is not None, "what is resumed has one"
        cancel_fd = self._control.cancel.fd
        return ask_fate(self.hand_over.migration, self._stream, self.return_path, cancel_fd)

    def resume(self) -> None:
        """Agree on what is still to be sent. See `source_recovery.agree_on_resume`."""
        assert self.return_path is not None, "what is resumed has one"
        agree_on_resume(self._stream, self.return_path, self._control.cancel.fd)
        self.release.check_not_wanted()
        self.preempt.start()

    # ---- after all of them, or after a failure ----

    def close(self) -> None:
        """Watch the guest's writes no more, throttle it no more, and end mig/return."""
        if self.dirty_log is not None:
            try:
                self.dirty_log.stop()
            except MigrationError:
                log.exception("the dirty log did not stop cleanly")
        self.end_return_path()
        for channel in self._more:
            channel.shutdown()  # whoever writes to it ends
        if self._multifd is not None:
            self._multifd.end()
        self._auto_converge.end()
