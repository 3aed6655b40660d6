"""The destination: waits for a source, loads its guest, and starts it. mig/load lives here.

    listen(uri)  ->  mig/load: accept -> load -> precopy: every page here? start the guest, SHUT 0, completed
                        ^                     -> postcopy: RUN starts the guest, mig/listen goes on to the end
                        |  failed: nothing of the attempt is left: RAM discarded, code flushed, devices reset
                        +--- and the next source is welcome (tcp:, unix:), whatever the last one was

The guest is started in one place, `_serve_one`, and only after the stream said all that a start needs; a
Pageferry source has to say so in words (`hand_over.py`). A paused postcopy goes on at the address that
migrate-recover opens (`recovery_door.py`, `recovery.py`); there a source learns what became of its guest.
Source: QEMU 7.2 migration/migration.c (process_incoming_migration_co, process_incoming_migration_bh).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from typing import TYPE_CHECKING

from uffd import UffdError
from vmm.errors import PageferryError
from vmm.migration import channel as channels
from vmm.migration.attempt import Attempt
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import (
    Cancelled,
    MigrationError,
    MigrationRefused,
    reason,
)
from vmm.migration.hand_over import Orders, StartOrder
from vmm.migration.loader import Outcome
from vmm.migration.multifd_accept import gather
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.page_pump.receiver import ReturnPathWriter
from vmm.migration.params import Capabilities, Capability, Parameters
from vmm.migration.peer import Fate
from vmm.migration.postcopy_state import PostcopyEvent, PostcopyState, PostcopyStateMachine
from vmm.migration.recovery import answer_questions
from vmm.migration.recovery_door import HANDSHAKE_MS, RecoveryDoor, is_question
from vmm.migration.status import MigrationStatus, Role, StatusMachine
from vmm.migration.uri import parse_uri
from vmm.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.faults import TestFault
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.kept import KeptState

__all__ = ["Destination"]

log = logging.getLogger(__name__)

EXIT_FAILURE = 1

DOOR_CLOSES_S = 1.0
"""Arbitrary; its thread has nothing to wait for once it was told."""

ACCEPT_AGAIN_MS = 100
"""How long we wait for descriptors or memory before we accept again; arbitrary."""


class Destination:
    """The incoming side of one process. `listen` once; status and postcopy state tell the rest."""

    def __init__(
        self,
        machine: MigratableMachine,
        capabilities: Capabilities,
        parameters: Parameters,
        status: StatusMachine,
        on_postcopy_state: Callable[[PostcopyState], None],
        kept: KeptState,
        orders: Orders,
        fault: TestFault | None = None,
    ) -> None:
        self._machine = machine
        self._capabilities = capabilities
        self._parameters = parameters
        self._status = status
        self._on_postcopy_state = on_postcopy_state
        self._kept = kept
        self._fault = fault
        self._cancel = CancelEvent()
        self._incoming: channels.Incoming | None = None
        self._thread = threading.Thread(target=self._main, name="mig/load")
        self._attempt: Attempt | None = None
        self._orders = orders
        self._door: RecoveryDoor | None = None
        self._exit_on_error = False
        self._is_clean = False  # RAM, devices and CPU as if nobody had ever been here
        self.is_over = False
        """It has failed, and nobody else can come: another one may take its place."""
        self.error_text: str | None = None

    # ---- what the migrator calls ----

    def listen(self, uri: str, take_fd: channels.TakeFd, *, exit_on_error: bool = False) -> None:
        """Open `uri` and wait for a source in the background.

        Raises:
            MigrationError, OSError: the URI is malformed, or cannot be opened; nothing has changed.
        """
        self._exit_on_error = exit_on_error
        address = parse_uri(uri, Role.DESTINATION)
        self._incoming = channels.listen(address, take_fd, self._parameters.patience)
        self._status.move(MigrationStatus.SETUP)
        self._thread.start()

    def recover(self, uri: str, take_fd: channels.TakeFd) -> None:
        """Wait at `uri`, in the background, for the source of the paused migration, or of one that has ended.

        Another address that was opened for it before is closed first.

        Raises:
            MigrationRefused: nothing is paused, and no source can want to know anything.
            MigrationError, OSError: the URI is malformed, or cannot be opened.
        """
        status = self._status.status
        ended = status in (MigrationStatus.FAILED, MigrationStatus.COMPLETED)
        if status is not MigrationStatus.POSTCOPY_PAUSED and not (ended and self._orders):
            raise MigrationRefused("Migrate recover can only be run when postcopy is paused.")
        address = parse_uri(uri, Role.DESTINATION)
        if not self.close_door():
            raise MigrationRefused("The address of the last migrate-recover is still in use")
        incoming = channels.listen(address, take_fd, self._parameters.patience)
        self._door = RecoveryDoor(incoming, functools.partial(self._come_back, incoming))

    def close_door(self) -> bool:
        """Let no source come back to the address of the last migrate-recover; False if it is still in use."""
        return self._door is None or self._door.close(DOOR_CLOSES_S)

    def pause(self) -> None:
        """migrate-pause: break the channel."""
        if self._attempt is not None:
            self._attempt.cut()

    @property
    def address(self) -> dict[str, object] | None:
        """Where we listen, for query-migrate's `socket-address`."""
        return self._incoming.address if self._incoming else None

    @property
    def recovery_address(self) -> dict[str, object] | None:
        """Where the source of a paused migration is waited for."""
        return self._door.address if self._door else None

    @property
    def attempt(self) -> Attempt | None:
        """The attempt under way, or the one that completed."""
        return self._attempt

    def has_missing_pages(self) -> bool:
        """Are pages still at the source, with the guest's CPU allowed to wait for them?"""
        attempt = self._attempt
        return attempt is not None and attempt.listener is not None and not attempt.listener.ended

    def shutdown(self, timeout_s: float) -> bool:
        """Give everything up and join the threads; False if one did not end in time."""
        self._cancel.set()
        attempt = self._attempt
        if attempt is not None:
            attempt.give_up()
        door_closed = self._door is None or self._door.close(timeout_s)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        ended = not self._thread.is_alive() and (attempt is None or attempt.join(timeout_s))
        return ended and door_closed

    # ---- mig/load ----

    def _main(self) -> None:
        incoming = self._incoming
        assert incoming is not None
        try:
            while not self._serve_one(incoming) and incoming.again:
                pass
        except Cancelled:
            log.info("mig/load: given up")
        finally:
            incoming.close()

    def _serve_one(self, incoming: channels.Incoming) -> bool:
        """One source, from its connection on. True if its guest is here, or may be."""
        channel = self._accept(incoming)
        if channel is None:
            return False
        if is_question(channel):
            self._answer(channel, StreamReader(channel.read_fd, self._cancel.fd, HANDSHAKE_MS))
            return False
        log.info("incoming migration on %s", incoming.name)
        self.error_text = None
        self._status.move(MigrationStatus.SETUP, only_from=MigrationStatus.FAILED)
        self._status.move(MigrationStatus.ACTIVE)
        attempt: Attempt | None = None
        try:
            channel = self._gather(incoming, channel)
            attempt = self._begin(channel)
            attempt.open_multifd(self._parameters)
            channel.second = self._accept_second(incoming, channel)
            outcome = attempt.load()
            if self._fault is not None:
                self._fault.before_start(self._machine.ram, attempt.loader.receiver.received)
            self._machine.start_after_migration()
        except Exception as error:
            self._undo(attempt, channel)
            if isinstance(error, Cancelled):
                raise
            if not isinstance(error, PageferryError | OSError | UffdError):
                log.exception("mig/load failed: a bug of ours")
            text = reason(error) if attempt is None else attempt.why(reason(error))
            self._failed(text, is_over=not incoming.again)
            return False
        self._started(attempt, outcome)
        return True

    def _accept(self, incoming: channels.Incoming) -> channels.Channel | None:
        """The next source; None if there are no descriptors or memory for it now. Raises Cancelled."""
        try:
            return incoming.accept(self._cancel.fd)
        except OSError as error:
            text = f"Cannot accept on {incoming.name}: {error.strerror or error}; trying again"
            if text != self.error_text:
                log.error("%s", text)  # once, not each time
                self.error_text = text
            wait_fd(-1, self._cancel.fd, ACCEPT_AGAIN_MS)
            return None

    def _accept_second(
        self, incoming: channels.Incoming, channel: channels.Channel
    ) -> channels.Channel | None:
        """postcopy-preempt: the connection that carries requested pages. Raises as `Incoming.second`."""
        if not self._capabilities[Capability.POSTCOPY_PREEMPT]:
            return None
        if incoming.second is None:
            raise MigrationError("Migration requires multi-channel URIs (e.g. tcp)")
        return incoming.second(self._cancel.fd, channel)

    def _gather(self, incoming: channels.Incoming, first: channels.Channel) -> channels.Channel:
        """The main stream's channel; with multifd the others are in its `more`. Raises as `gather`."""
        if not self._capabilities[Capability.MULTIFD]:
            return first
        if incoming.second is None:
            raise MigrationError("multifd is not supported by current protocol")
        count, limit_ms = self._parameters["multifd-channels"], self._parameters.patience().handshake_ms
        return gather(first, incoming.accept, count, self._cancel.fd, limit_ms)

    def _begin(self, channel: channels.Channel) -> Attempt:
        if not self._is_clean:
            self._clean()
        self._is_clean = False
        postcopy = PostcopyStateMachine(self._on_postcopy_state)
        attempt = Attempt(self, self._machine, channel, self._capabilities, postcopy, self._kept)
        self._attempt = attempt
        return attempt

    def _clean(self) -> None:
        """Give RAM back, and make devices and CPU as after a reset. Raises PageferryError, OSError."""
        self._machine.forget_incoming_state()
        for block in self._machine.ram.blocks:
            block.discard_all()  # nothing is preloaded: an untouched page is a page of zeroes
        self._is_clean = True

    def _undo(self, attempt: Attempt | None, channel: channels.Channel) -> None:
        """Whatever goes wrong here, mig/load goes on: the next attempt cleans up before it begins."""
        try:
            if attempt is not None:
                attempt.fail()
            else:
                channel.abort()
                channel.close()
        except Exception:
            log.exception("an incoming migration that failed did not end cleanly")

    def _started(self, attempt: Attempt, outcome: Outcome) -> None:
        """The guest is ours, and nothing that fails from here on gives it back."""
        attempt.tell_started()
        if attempt.listener is not None:
            attempt.listener.package_loaded()
        if outcome is Outcome.COMPLETE:
            if attempt.postcopy.state is not PostcopyState.NONE:
                attempt.postcopy.handle(PostcopyEvent.END)
            attempt.finish()
            self._status.move(MigrationStatus.COMPLETED)

    def _failed(self, text: str, *, is_over: bool) -> None:
        # Forgotten before it is said: whoever reads the status finds a machine that can try again.
        log.error("incoming migration failed: %s", text)
        self._attempt = None
        self._kept.forget()
        try:
            self._clean()
        except Exception:
            log.exception("what had come of an incoming migration could not be forgotten")
        self.error_text = text
        self.is_over = is_over
        self._status.move(MigrationStatus.FAILED)
        if self._exit_on_error:
            self._machine.power_off(EXIT_FAILURE)

    # ---- mig/recover ----

    def _come_back(
        self, incoming: channels.Incoming, channel: channels.Channel, reader: StreamReader
    ) -> bool:
        """Somebody speaks at the recovery's address. True if nobody else needs to come."""
        attempt = self._attempt
        if attempt is not None and self._status.status is MigrationStatus.POSTCOPY_PAUSED:
            try:
                channel.second = self._accept_second(incoming, channel)
            except Cancelled:
                channel.close()
                raise
            except (PageferryError, OSError) as error:
                log.warning("turned away at the recovery's address: %s", reason(error))
                channel.close()
                return False
            return attempt.recover(channel, reader, self._orders)
        return self._answer(channel, reader)

    def _answer(self, channel: channels.Channel, reader: StreamReader) -> bool:
        """A source wants to know what became of its guest. True if we could tell it."""
        try:
            return_path = ReturnPathWriter(channel.write_fd, self._cancel.fd)
            fate = answer_questions(reader, return_path, self._orders)
            log.info("the source has asked for its guest: %s", fate.name)
            return fate is not Fate.UNKNOWN
        except (PageferryError, OSError) as error:
            log.warning("turned away at the recovery's address: %s", reason(error))
            return False
        finally:
            channel.close()

    # ---- reports of the attempt's threads ----

    def peer_timeout_ms(self) -> int:
        """How long a source may be silent, as it is set now."""
        return self._parameters.patience().peer_ms

    def name(self, migration: bytes) -> StartOrder:
        """The source has given the migration under way a name."""
        return self._orders.new(migration)

    def recovering(self) -> None:
        """A source is there again. (mig/listen)"""
        self._status.move(MigrationStatus.POSTCOPY_RECOVER)

    def resumed(self) -> None:
        """Recovery is agreed. (mig/listen)"""
        self.error_text = None
        self._status.move(MigrationStatus.POSTCOPY_ACTIVE)

    def dead(self, text: str) -> None:
        """Faults are not served any more: a guest that goes on would only hang. (mig/listen)"""
        log.error("the guest is stopped: %s", text)
        self._machine.stop(RunState.INTERNAL_ERROR, wait_s=0)
        self.lost(text)

    def listening(self) -> None:
        """LISTEN was obeyed: pages come on demand from now on."""
        self._status.move(MigrationStatus.POSTCOPY_ACTIVE)

    def ended(self, attempt: Attempt) -> None:
        """Every page is here and the RAM is plain memory again. (mig/listen)"""
        attempt.finish()
        self._status.move(MigrationStatus.COMPLETED)

    def lost(self, text: str) -> None:
        """The channel is lost, or what came is wrong; pages are missing. (mig/listen)"""
        log.error("postcopy paused: %s", text)
        self.error_text = text
        if self._attempt is not None:
            self._attempt.cut()  # the source may not have noticed
        with contextlib.suppress(PageferryError):  # lost twice is lost
            self._status.move(MigrationStatus.POSTCOPY_PAUSED)
