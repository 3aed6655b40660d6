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
import logging
import threading
import weakref
from typing import TYPE_CHECKING

from uffd import UffdError
from vmm.errors import PageferryError
from vmm.migration import channel as channels
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import (
    Cancelled,
    LostPages,
    MigrationError,
    MigrationRefused,
    PeerError,
    reason,
)
from vmm.migration.hand_over import Orders, StartOrder
from vmm.migration.listen import ListenThread
from vmm.migration.loader import Loader, Outcome
from vmm.migration.page_pump.native import wait_fd
from vmm.migration.page_pump.receiver import ReturnPathWriter
from vmm.migration.params import Capabilities, Capability, Parameters
from vmm.migration.peer import ALIVE_MAGIC, Fate
from vmm.migration.postcopy_state import PostcopyEvent, PostcopyState, PostcopyStateMachine
from vmm.migration.recovery import DestinationRecovery, answer_questions
from vmm.migration.recovery_door import HANDSHAKE_MS, RecoveryDoor, is_question
from vmm.migration.return_path import Message, MessageWriter, Pong, Shut, Started
from vmm.migration.silence import SilenceWatch
from vmm.migration.status import MigrationStatus, Role, StatusMachine
from vmm.migration.uri import parse_uri
from vmm.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.blocktime import Blocktime
    from vmm.migration.faults import TestFault
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.kept import KeptState
    from vmm.migration.stats import FaultLatencies

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
        self._attempt: _Attempt | None = None
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
        if self._door is not None and not self._door.close(DOOR_CLOSES_S):
            raise MigrationRefused("The address of the last migrate-recover is still in use")
        incoming = channels.listen(address, take_fd, self._parameters.patience)
        self._door = RecoveryDoor(incoming, self._come_back)

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
    def attempt(self) -> _Attempt | None:
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
        attempt: _Attempt | None = None
        try:
            attempt = self._begin(channel)
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

    def _begin(self, channel: channels.Channel) -> _Attempt:
        if not self._is_clean:
            self._clean()
        self._is_clean = False
        postcopy = PostcopyStateMachine(self._on_postcopy_state)
        attempt = _Attempt(self, self._machine, channel, self._capabilities, postcopy, self._kept)
        self._attempt = attempt
        return attempt

    def _clean(self) -> None:
        """Give RAM back, and make devices and CPU as after a reset. Raises PageferryError, OSError."""
        self._machine.forget_incoming_state()
        for block in self._machine.ram.blocks:
            block.discard_all()  # nothing is preloaded: an untouched page is a page of zeroes
        self._is_clean = True

    def _undo(self, attempt: _Attempt | None, channel: channels.Channel) -> None:
        """Whatever goes wrong here, mig/load goes on: the next attempt cleans up before it begins."""
        try:
            if attempt is not None:
                attempt.fail()
            else:
                channel.abort()
                channel.close()
        except Exception:
            log.exception("an incoming migration that failed did not end cleanly")

    def _started(self, attempt: _Attempt, outcome: Outcome) -> None:
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

    def _come_back(self, channel: channels.Channel, reader: StreamReader) -> bool:
        """Somebody speaks at the recovery's address. True if nobody else needs to come."""
        attempt = self._attempt
        if attempt is not None and self._status.status is MigrationStatus.POSTCOPY_PAUSED:
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

    def ended(self, attempt: _Attempt) -> None:
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


class _Visit:
    """A source that has come back: what it brought, and how it went."""

    def __init__(self, channel: channels.Channel, return_path: ReturnPathWriter) -> None:
        self.channel = channel
        self.return_path = return_path
        self._ended = threading.Event()
        self._resumed = False

    def end(self, *, resumed: bool) -> None:
        """Tell who waits. Any thread; the first word counts."""
        if not self._ended.is_set():
            self._resumed = resumed
            self._ended.set()

    def wait(self) -> bool:
        """Until mig/listen has said whether both sides go on."""
        self._ended.wait()
        return self._resumed


class _Attempt:
    """What exists only while one source is being listened to."""

    def __init__(
        self,
        owner: Destination,
        machine: MigratableMachine,
        channel: channels.Channel,
        capabilities: Capabilities,
        postcopy: PostcopyStateMachine,
        kept: KeptState,
    ) -> None:
        self.channel = channel
        self.cancel = CancelEvent()
        self.postcopy = postcopy
        self.listener: ListenThread | None = None
        self._owner = owner
        self._machine = machine
        self._capabilities = capabilities
        self._return_path: ReturnPathWriter | None = None
        self._cut_lock = threading.Lock()  # protects `channel` while a shutdown may meet its close
        self._visit: _Visit | None = None
        self._watch: SilenceWatch | None = None
        self._silence: str | None = None
        for block in machine.ram.blocks:
            block.use_huge_pages(not capabilities[Capability.POSTCOPY_RAM])
        reader = StreamReader(channel.read_fd, self.cancel.fd)
        # Weak: what an ended attempt holds is freed with it, not when Python looks for cycles.
        self.loader = Loader(machine, reader, capabilities, postcopy, weakref.proxy(self), kept)

    def load(self) -> Outcome:
        """See `Loader.run`; and the guest may be started, if the source has a word in that."""
        outcome = self.loader.run()
        if outcome is Outcome.COMPLETE:
            self.check_complete()
        self.loader.await_start(outcome)
        return outcome

    def name(self, migration: bytes) -> StartOrder:
        """See `LoaderHost`."""
        return self._owner.name(migration)

    def tell_started(self) -> None:
        """For a source that wants to know; that the channel is lost is for mig/listen to notice."""
        if self.loader.order is not None:
            self._say(Started())

    def check_complete(self) -> None:
        """Raises LostPages: the stream ended, but not every page of every RAMBlock came. Or PeerError."""
        if self.postcopy.state not in (PostcopyState.NONE, PostcopyState.ADVISE):
            raise PeerError(f"The stream ended in postcopy state '{self.postcopy.state.value}'")
        missing = self.loader.receiver.missing()
        if missing:
            raise LostPages(missing)

    def open_return_path(self) -> ReturnPathWriter:
        """See `LoaderHost`."""
        if not self.channel.two_way:
            raise PeerError(f"The source wants a return path, and {self.channel.name} is one-way")
        self._return_path = ReturnPathWriter(self.channel.write_fd, self.cancel.fd)
        weak = weakref.proxy(self)
        self._watch = SilenceWatch(
            lambda: weak._heard(),
            self._owner.peer_timeout_ms,
            lambda how_long: weak._silent(how_long),
            lambda: weak._beat(),
        )
        self._watch.start()
        return self._return_path

    # ---- mig/watch ----

    def _heard(self) -> int | None:
        """Only a Pageferry source that is connected is expected to give signs of life."""
        reader = self.loader.reader
        is_expected = self.loader.peer_is_pageferry and reader.struct.fd >= 0
        return reader.received_bytes if is_expected else None

    def _silent(self, how_long: str) -> None:
        self._silence = f"The source is silent: {how_long}"
        self.cut()

    def _beat(self) -> None:
        if self.loader.peer_is_pageferry:
            self._say(Pong(ALIVE_MAGIC))

    def why(self, text: str) -> str:
        """`text`, unless the channel ended because the source was silent: then that."""
        silence, self._silence = self._silence, None
        return silence or text

    def listen(self, loader: Loader) -> None:
        """See `LoaderHost`. (mig/load, while it obeys LISTEN)"""
        if loader.return_path is None:
            raise PeerError("POSTCOPY_LISTEN without a return path")
        self._owner.listening()
        loader.receiver.struct.vcpu_thread = self._machine.vcpu_thread_id
        self.listener = ListenThread(self._machine.ram, loader, weakref.proxy(self))
        self.listener.start()

    # ---- ListenHost, on mig/listen ----

    def on_end(self) -> None:
        self.postcopy.handle(PostcopyEvent.END)
        self._owner.ended(self)

    def on_lost(self, text: str) -> None:
        visit, self._visit = self._visit, None
        self._owner.lost(self.why(text))
        if visit is not None:
            visit.end(resumed=False)

    def on_recover(self) -> None:
        visit = self._visit
        assert visit is not None, "mig/listen takes what `recover` gives it"
        with self._cut_lock:
            old, self.channel = self.channel, visit.channel
        old.close()
        self._return_path = visit.return_path
        self._owner.recovering()

    def on_resume(self) -> None:
        self._owner.resumed()
        visit, self._visit = self._visit, None
        if visit is not None:
            visit.end(resumed=True)

    def on_dead(self, text: str) -> None:
        self._owner.dead(text)

    def recover(self, channel: channels.Channel, reader: StreamReader, orders: Orders) -> bool:
        """Go on over `channel`; True once both sides have agreed, False if it broke before. (mig/recover)"""
        assert self.listener is not None, "only a postcopy is paused"
        self.listener.wait_package_loaded()  # mig/load may still write to the old channel
        reader.struct.cancel_fd = self.cancel.fd
        return_path = ReturnPathWriter(channel.write_fd, self.cancel.fd)
        visit = self._visit = _Visit(channel, return_path)
        recovery = DestinationRecovery(self.loader, self.postcopy, return_path, orders)
        self.listener.resume(reader, return_path, recovery)
        return visit.wait()

    def cut(self) -> None:
        """Break the channel: who waits on it notices at once. Any thread."""
        with self._cut_lock:
            self.channel.shutdown()

    # ---- the end ----

    def finish(self) -> None:
        """The guest is ours: tell the source, close the channel."""
        if self.loader.order is not None:
            self.loader.order.complete()
        self._say(Shut(0))
        with contextlib.suppress(PageferryError, OSError):
            self.channel.finish()
        self._close()

    def fail(self) -> None:
        """The guest did not start here, and will not: say so, while the channel still stands."""
        order = self.loader.order
        if order is not None and not order.withdraw(MigrationError("The guest could not be loaded")):
            order.could_not_start()
        self._say(Shut(1))
        self.cancel.set()
        if self.listener is not None:
            self.listener.abandon()
        self.channel.abort()
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        with self._cut_lock:
            self.channel.close()

    def give_up(self) -> None:
        """The process ends: make the threads end. Any thread."""
        self.cancel.set()
        if self.loader.order is not None:
            self.loader.order.withdraw(Cancelled())
        if self.listener is not None:
            self.listener.give_up()
        visit = self._visit
        if visit is not None:
            visit.end(resumed=False)

    def _say(self, message: Message) -> None:
        if self._return_path is None:
            return
        with contextlib.suppress(OSError, Cancelled):
            self._return_path.send(MessageWriter().write(message))

    def join(self, timeout_s: float) -> bool:
        """Wait for mig/listen."""
        if self._watch is not None:
            self._watch.stop()
        return self.listener is None or self.listener.join(timeout_s)

    def blocktime(self) -> Blocktime | None:
        """How long the guest was blocked, if there was a postcopy and the capability is on."""
        is_wanted = self._capabilities[Capability.POSTCOPY_BLOCKTIME] and self.listener is not None
        return self.loader.receiver.blocktime() if is_wanted else None

    def latency(self) -> FaultLatencies:
        """What waiting for pages has cost so far."""
        return self.loader.receiver.latency()
