"""`Migrator`: what the control side talks to. Commands in, query-migrate's dict and events out.

It owns the capabilities, the parameters, and at most one outgoing and one incoming migration; the rules for
which command may come when are here, with QEMU's texts. No JSON, no asyncio; any thread may call.

Source: QEMU 7.2 migration/migration.c (qmp_migrate ... fill_source_migration_info), qapi/migration.json.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import uffd
from vmm.migration.advice import next_at_destination, next_at_source
from vmm.migration.channel import TakeFd
from vmm.migration.destination import Destination
from vmm.migration.errors import MigrationRefused, ParameterRefused
from vmm.migration.faults import FaultKind, TestFault
from vmm.migration.hand_over import Orders
from vmm.migration.kept import KeptState
from vmm.migration.page_checks import query_received
from vmm.migration.params import Capabilities, Capability, Parameters
from vmm.migration.postcopy_state import PostcopyState
from vmm.migration.source import Source, SourceSettings
from vmm.migration.stats import MigrationStats
from vmm.migration.status import MigrationStatus, Role, StatusMachine
from vmm.migration.uri import FdAddress, parse_uri
from vmm.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vmm.migration.bitmap import Bitmap
    from vmm.migration.guest import MigratableMachine

__all__ = ["Migrator"]

PAUSABLE = (MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.POSTCOPY_RECOVER)

PAGE_MAP_CELLS = 64
"""How many cells query-migrate's `x-page-map` has; arbitrary, a line of a terminal."""


class NamedFds(Protocol):
    """The descriptors that a client has passed."""

    def take(self, name: str) -> int:
        """The descriptor of that name; the caller owns it from now on. Raises an error for a user."""


def _taker(fds: NamedFds | None) -> TakeFd:
    """How fd:NAME becomes a descriptor: a number is an inherited one, everything else a passed one."""

    def take(name: str) -> int:
        number = FdAddress(name).number
        if number is not None:
            try:
                os.fstat(number)
            except OSError as error:
                raise MigrationRefused(f"File descriptor {name} is not open: {error.strerror}") from error
            return number
        if fds is None:
            raise MigrationRefused(f"File descriptor named '{name}' has not been found")
        return fds.take(name)

    return take


RESULTS = (
    *((Role.SOURCE.value, status) for status in ("completed", "failed", "cancelled")),
    *((Role.DESTINATION.value, status) for status in ("completed", "failed")),
)


class Migrator:
    """The migrations of one machine."""

    def __init__(self, machine: MigratableMachine, notify: Callable[[str, dict[str, Any]], None]) -> None:
        self._machine = machine
        self._notify = notify
        self._lock = threading.Lock()  # one command at a time decides what may start
        self.capabilities = Capabilities(lambda: uffd.probe().why_no_missing)
        self.parameters = Parameters()
        self._fault = TestFault()
        self._kept = KeptState()
        self._orders = Orders()
        self._since_s: dict[Role, float] = {}
        self._exit_on_error = False
        self._source_status = StatusMachine(Role.SOURCE, self._status_changed)
        self._source: Source | None = None
        self._stats: MigrationStats | None = None
        self._incoming_status = StatusMachine(Role.DESTINATION, self._incoming_status_changed)
        self._destination: Destination | None = None
        machine.cont_guard = self._cont_refusal
        self.results = dict.fromkeys(RESULTS, 0)
        """How many migrations have ended, by role and last status."""

    # ---- events ----

    def _count(self, role: Role, status: MigrationStatus) -> None:
        self._since_s[role] = time.time()
        key = (role.value, status.value)
        if key in self.results:
            self.results[key] += 1  # by one thread at a time: a role has one status machine

    def _status_changed(self, status: MigrationStatus) -> None:
        self._count(Role.SOURCE, status)
        if self.capabilities[Capability.EVENTS]:
            self._notify("MIGRATION", {"status": status.value})

    def _incoming_status_changed(self, status: MigrationStatus) -> None:
        self._count(Role.DESTINATION, status)
        # migrate-incoming reports its set-up even without the capability, as QEMU 7.2 does.
        if status is MigrationStatus.SETUP or self.capabilities[Capability.EVENTS]:
            self._notify("MIGRATION", {"status": status.value})

    def _pass_done(self, number: int) -> None:
        if self.capabilities[Capability.EVENTS]:
            self._notify("MIGRATION_PASS", {"pass": number})

    def _postcopy_state_changed(self, state: PostcopyState) -> None:
        self._notify("POSTCOPY_STATE", {"state": state.value})

    # ---- the source's commands ----

    def migrate(
        self,
        uri: str,
        *,
        resume: bool = False,
        blk: bool = False,
        inc: bool = False,
        fds: NamedFds | None = None,
    ) -> None:
        """Send the guest to `uri`, in the background.

        Raises:
            MigrationRefused: not now, or not to there; nothing has changed.
            MigrationError, OSError: a descriptor, file or command cannot be had.
        """
        with self._lock:
            self._check_may_migrate(resume)
            if blk or inc:
                raise MigrationRefused("Block migration is not supported: disks do not migrate")
            address = parse_uri(uri, Role.SOURCE)
            if resume and self._source is not None:
                self._source.resume(address, _taker(fds))
                return
            self._check_spool()
            total_bytes = sum(b.length_bytes for b in (*self._machine.ram.blocks, *self._kept.blocks))
            stats = MigrationStats(time.monotonic_ns, total_bytes, self.parameters.downtime_limit_ms)
            settings = SourceSettings(self.capabilities, self.parameters, self._kept, self._fault)
            source = Source(self._machine, settings, self._source_status, stats, self._pass_done)
            previous, self._source, self._stats = (self._source, self._stats), source, stats
            try:
                source.start(address, _taker(fds))
            except Exception:
                self._source, self._stats = previous
                raise

    def _check_spool(self) -> None:
        if self.capabilities[Capability.X_POSTCOPY_SPOOL] and not self.parameters.postcopy_spool_path:
            raise MigrationRefused(
                "The capability x-postcopy-spool needs the parameter x-postcopy-spool-path"
            )

    def _check_may_migrate(self, resume: bool) -> None:
        if self._source_status.is_in_progress and not resume:
            raise MigrationRefused("There's a migration process in progress")
        if resume:
            if self._source_status.status is not MigrationStatus.POSTCOPY_PAUSED:
                raise MigrationRefused("Cannot resume if there is no paused migration")
            return
        run_state = self._machine.run_state
        if run_state is RunState.INMIGRATE or self._incoming_status.is_in_progress:
            raise MigrationRefused("Guest is waiting for an incoming migration")
        if run_state is RunState.POSTMIGRATE:
            raise MigrationRefused("Can't migrate the vm that was paused due to previous migration")

    def cancel(self) -> None:
        """Give the outgoing migration up; the guest stays here. Nothing to do if there is none.

        Raises:
            MigrationRefused: it is in postcopy, or already handed over.
        """
        if self._source is not None:
            self._source.cancel()

    def start_postcopy(self) -> None:
        """Switch the outgoing migration to postcopy; harmless when it has ended.

        Raises:
            MigrationRefused: the capability is off, or there never was a migration.
        """
        if not self.capabilities[Capability.POSTCOPY_RAM]:
            raise MigrationRefused(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self._source is None:
            raise MigrationRefused("Postcopy must be started after migration has been started")
        self._source.start_postcopy()

    def continue_(self, state: str) -> None:
        """Leave `state`, which must be the present status. Raises MigrationRefused."""
        now = self._source_status.status
        if now.value != state:
            raise MigrationRefused(f"Migration not in expected state: {now.value}")
        if now is MigrationStatus.PRE_SWITCHOVER and self._source is not None:
            self._source.continue_()

    def pause(self) -> None:
        """Break the channel of a postcopy, on either side; also in a recovery, as newer QEMUs do.

        Raises:
            MigrationRefused: there is none.
        """
        if self._source is not None and self._source_status.status in PAUSABLE:
            self._source.pause()
        elif self._destination is not None and self._incoming_status.status in PAUSABLE:
            self._destination.pause()
        else:
            raise MigrationRefused("migrate-pause is currently only supported during postcopy-active state")

    def recover(self, uri: str, *, fds: NamedFds | None = None) -> None:
        """At the destination: wait for the source of a paused migration at `uri`, in the background.

        Raises:
            MigrationRefused: nothing is paused.
            MigrationError, OSError: the address cannot be had; another one may be tried.
        """
        with self._lock:
            if self._destination is None:
                raise MigrationRefused("Migrate recover can only be run when postcopy is paused.")
            self._destination.recover(uri, _taker(fds))
            self._notify("MIGRATION", {"status": MigrationStatus.SETUP.value})  # as QEMU 7.2 does

    def take_back(self) -> None:
        """The destination is gone for good: let `cont` run the guest here as it was when it was handed over.

        Raises:
            MigrationRefused: it was not handed over, or the connection still stands.
        """
        if self._source is None:
            raise MigrationRefused("The guest was not handed over to another machine")
        self._source.take_back()

    def _cont_refusal(self) -> str | None:
        return None if self._source is None else self._source.cont_refusal

    # ---- the destination's command ----

    def incoming(self, uri: str, *, exit_on_error: bool | None = None, fds: NamedFds | None = None) -> None:
        """Wait for a guest at `uri`, in the background.

        With `exit_on_error` the process ends when an attempt fails, as QEMU 7.2 does. Without, it goes on to
        listen; None: as `-global migration.x-exit-on-error` says, by default off.

        Raises:
            MigrationRefused: not started with -incoming, or already listening.
            MigrationError, OSError: the address cannot be had; another one may be tried.
        """
        with self._lock:
            if self._machine.config.incoming is None:
                raise MigrationRefused("'-incoming' was not specified on the command line")
            if self._destination is not None and not self._destination.is_over:
                raise MigrationRefused("The incoming migration has already been started")
            destination = Destination(
                self._machine,
                self.capabilities,
                self.parameters,
                self._incoming_status,
                self._postcopy_state_changed,
                self._kept,
                self._orders,
                self._fault,
            )
            if exit_on_error is None:
                exit_on_error = self._exit_on_error
            destination.listen(uri, _taker(fds), exit_on_error=exit_on_error)
            before, self._destination = self._destination, destination
            if before is not None:
                before.close_door()

    # ---- settings ----

    def set_capabilities(self, changes: Iterable[Mapping[str, Any]]) -> None:
        """`[{"capability", "state"}]`, all or none. Raises MigrationRefused, ParameterRefused."""
        if self._source_status.is_in_progress or self._is_receiving():
            raise MigrationRefused("There's a migration process in progress")
        self.capabilities.set(changes)

    def _is_receiving(self) -> bool:
        status = self._incoming_status
        return status.is_in_progress and status.status is not MigrationStatus.SETUP

    def query_capabilities(self) -> list[dict[str, Any]]:
        """query-migrate-capabilities."""
        return self.capabilities.query()

    def set_parameters(self, changes: Mapping[str, Any]) -> None:
        """migrate-set-parameters, all or none. Raises ParameterRefused."""
        self.parameters.set(changes)

    def query_parameters(self) -> dict[str, Any]:
        """query-migrate-parameters."""
        return self.parameters.query()

    def set_global(self, name: str, value: str) -> None:
        """`-global migration.NAME=VALUE`: a parameter, a capability as `x-NAME` or `NAME`, `x-fault`,
        `x-exit-on-error`.

        Raises:
            ParameterRefused: there is no such property, or it does not take the value.
        """
        if name == "x-fault":
            self._fault = TestFault(FaultKind(value))
        elif name == "x-exit-on-error":
            if value not in ("on", "off"):
                raise ParameterRefused(name, f"Parameter '{name}' expects 'on' or 'off'")
            self._exit_on_error = value == "on"
        elif value in ("on", "off") and name.removeprefix("x-") in {c.value for c in Capability}:
            self.capabilities.set_one(name.removeprefix("x-"), value == "on")
        else:
            self.parameters.set_one(name, value)

    def guest_was_reset(self) -> None:
        """What a peer's devices were like is past: a guest that goes back there finds them reset."""
        self._kept.forget_sections()

    # ---- query-migrate ----

    def query(self) -> dict[str, Any]:
        """query-migrate's reply: the outgoing migration's, or the incoming one's."""
        if self._source is not None and self._stats is not None:
            return self._query_source(self._source, self._stats) | self._advice_at_source(self._source)
        if self._destination is not None:
            return self._query_destination(self._destination) | self._advice_at_destination(self._destination)
        return {}

    def _advice_at_source(self, source: Source) -> dict[str, Any]:
        steps = next_at_source(self._source_status.status, handed_over=source.cont_refusal is not None)
        return self._advice(Role.SOURCE, steps)

    def _advice_at_destination(self, destination: Destination) -> dict[str, Any]:
        steps = next_at_destination(
            self._incoming_status.status,
            listening=not destination.is_over,
            recovering=destination.recovery_address is not None,
        )
        return self._advice(Role.DESTINATION, steps)

    def _advice(self, role: Role, steps: list[str]) -> dict[str, Any]:
        """What a user can do, and how long it has been so; nothing where nothing needs to be done."""
        if not steps:
            return {}
        seconds, rest = divmod(self._since_s[role], 1)
        return {"x-since": {"seconds": int(seconds), "microseconds": int(rest * 1e6)}, "x-next": steps}

    def _query_source(self, source: Source, stats: MigrationStats) -> dict[str, Any]:
        status = self._source_status.status
        snapshot = stats.snapshot()
        reply = snapshot.query(status)
        if source.error_text is not None and status in (
            MigrationStatus.FAILED,
            MigrationStatus.POSTCOPY_PAUSED,
        ):
            reply["error-desc"] = source.error_text
        if "ram" not in reply:
            return reply
        reply["x-postcopy"] = snapshot.postcopy()
        checksums = source.page_checksums()
        if checksums is not None:
            reply["x-page-checksums"] = checksums
        if source.sender is not None:
            reply["x-page-map"] = _page_map(source.sender.dirty.values(), value=False)
        if source.dirty_log is not None:
            reply["x-dirty-log"] = {"rung": source.dirty_log.rung}
            if source.dirty_log.passed_over:
                reply["x-dirty-log"]["passed-over"] = dict(source.dirty_log.passed_over)
        return reply

    def _query_destination(self, destination: Destination) -> dict[str, Any]:
        status = self._incoming_status.status
        if status is MigrationStatus.SETUP:
            waiting: dict[str, Any] = {"socket-address": [destination.address]} if destination.address else {}
            return waiting | ({"error-desc": destination.error_text} if destination.error_text else {})
        reply: dict[str, Any] = {"status": status.value}
        if destination.error_text is not None:
            reply["error-desc"] = destination.error_text
        if destination.recovery_address is not None:
            reply["socket-address"] = [destination.recovery_address]
        attempt = destination.attempt
        if attempt is not None:
            reply["x-fault-latency"] = attempt.latency().query()
            blocktime = attempt.blocktime()
            if blocktime is not None:
                reply |= blocktime.query()
            reply["x-page-map"] = _page_map(attempt.loader.receiver.received.values(), value=True)
            reply["x-received"] = attempt.loader.receiver.counters()
            checksums = query_received(attempt.loader.receiver, self.capabilities)
            if checksums is not None:
                reply["x-page-checksums"] = checksums
            if status in (MigrationStatus.POSTCOPY_PAUSED, MigrationStatus.POSTCOPY_RECOVER):
                reply["x-missing"] = attempt.loader.receiver.missing_counts()
        return reply

    def waited_page(self) -> tuple[str, int, bool] | None:
        """A page that somebody waits for: RAMBlock, offset in bytes, and whether its source is lost."""
        attempt = self._destination.attempt if self._destination is not None else None
        if attempt is None or attempt.listener is None or attempt.listener.ended:
            return None
        place = attempt.loader.receiver.waited_page()
        if place is None:
            return None
        is_lost = self._incoming_status.status is not MigrationStatus.POSTCOPY_ACTIVE
        return place[0], place[1] * uffd.PAGE_SIZE_BYTES, is_lost

    # ---- the end of the process ----

    @property
    def has_missing_pages(self) -> bool:
        """Would unregistering the RAM, as the end of the process does, turn missing pages into zeroes?"""
        return self._destination is not None and self._destination.has_missing_pages()

    def shutdown(self, timeout_s: float) -> bool:
        """Give up whatever is under way and join the threads; False if one did not end in time."""
        ended = True
        if self._source is not None:
            self._source.abandon()
            ended = self._source.join(timeout_s)
        if self._destination is not None:
            ended = self._destination.shutdown(timeout_s) and ended
        return ended


def _page_map(bitmaps: Iterable[Bitmap], *, value: bool) -> list[float]:
    """The part of done pages in each of up to PAGE_MAP_CELLS stretches of RAM, 0 to 1, block after block."""
    blocks = list(bitmaps)
    step = -(-sum(bitmap.pages for bitmap in blocks) // max(PAGE_MAP_CELLS - len(blocks), 1))
    cells = []
    for bitmap in blocks:
        for index, done in enumerate(bitmap.count_stretches(step)):
            count = min(step, bitmap.pages - index * step)
            cells.append(round((done if value else count - done) / count, 3))
    return cells
