"""The destination: waits for a source, loads its guest, and starts it. mig/load lives here.

    listen(uri)  ->  mig/load: accept -> load -> precopy: every page here? start the guest, SHUT 0, completed
                        ^                     -> postcopy: RUN starts the guest, mig/listen goes on to the end
                        |  failed: nothing of the attempt is left: RAM discarded, code flushed, devices reset
                        +--- and the next source is welcome (tcp:, unix:)

The guest is started in one place, `_start_guest`, and only after the stream said all that a start needs.
Source: QEMU 7.2 migration/migration.c (process_incoming_migration_co, process_incoming_migration_bh).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from uffd import UffdError
from vmm.errors import PageferryError
from vmm.migration import channel as channels
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled, LostPages, PeerError, reason
from vmm.migration.listen import ListenThread
from vmm.migration.loader import Loader, Outcome
from vmm.migration.page_pump.receiver import ReturnPathWriter
from vmm.migration.params import Capabilities, Capability
from vmm.migration.postcopy_state import PostcopyEvent, PostcopyState, PostcopyStateMachine
from vmm.migration.return_path import MessageWriter, Shut
from vmm.migration.status import MigrationStatus, Role, StatusMachine
from vmm.migration.uri import parse_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.blocktime import Blocktime
    from vmm.migration.faults import TestFault
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.kept import KeptState
    from vmm.migration.stats import FaultLatencies

__all__ = ["Destination"]

log = logging.getLogger(__name__)


class Destination:
    """The incoming side of one process. `listen` once; status and postcopy state tell the rest."""

    def __init__(
        self,
        machine: MigratableMachine,
        capabilities: Capabilities,
        status: StatusMachine,
        on_postcopy_state: Callable[[PostcopyState], None],
        kept: KeptState,
        fault: TestFault | None = None,
    ) -> None:
        self._machine = machine
        self._capabilities = capabilities
        self._status = status
        self._on_postcopy_state = on_postcopy_state
        self._kept = kept
        self._fault = fault
        self._cancel = CancelEvent()
        self._incoming: channels.Incoming | None = None
        self._thread = threading.Thread(target=self._main, name="mig/load")
        self._attempt: _Attempt | None = None
        self.error_text: str | None = None

    # ---- what the migrator calls ----

    def listen(self, uri: str, take_fd: channels.TakeFd) -> None:
        """Open `uri` and wait for a source in the background.

        Raises:
            MigrationError, OSError: the URI is malformed, or cannot be opened; nothing has changed.
        """
        self._incoming = channels.listen(parse_uri(uri, Role.DESTINATION), take_fd)
        self._status.move(MigrationStatus.SETUP)
        self._thread.start()

    @property
    def address(self) -> dict[str, object] | None:
        """Where we listen, for query-migrate's `socket-address`."""
        return self._incoming.address if self._incoming else None

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
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive() and (attempt is None or attempt.join(timeout_s))

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
        channel = incoming.accept(self._cancel.fd)
        log.info("incoming migration on %s", incoming.name)
        postcopy = PostcopyStateMachine(self._on_postcopy_state)
        attempt = _Attempt(self, self._machine, channel, self._capabilities, postcopy, self._kept)
        self._attempt = attempt
        self.error_text = None
        self._status.move(MigrationStatus.SETUP, only_from=MigrationStatus.FAILED)
        self._status.move(MigrationStatus.ACTIVE)
        try:
            outcome = attempt.load()
            if outcome is Outcome.COMPLETE:
                attempt.check_complete()
            if self._fault is not None:
                self._fault.before_start(self._machine.ram, attempt.loader.receiver.received)
            self._machine.start_after_migration()
        except Exception as error:
            attempt.fail()
            if isinstance(error, Cancelled):
                raise
            if not isinstance(error, PageferryError | OSError | UffdError):
                log.exception("mig/load failed: a bug of ours")
            self._failed(reason(error))
            return False
        self._started(attempt, outcome)
        return True

    def _started(self, attempt: _Attempt, outcome: Outcome) -> None:
        """The guest is ours, and nothing that fails from here on gives it back."""
        if attempt.listener is not None:
            attempt.listener.package_loaded()
        if outcome is Outcome.COMPLETE:
            if attempt.postcopy.state is not PostcopyState.NONE:
                attempt.postcopy.handle(PostcopyEvent.END)
            attempt.finish()
            self._status.move(MigrationStatus.COMPLETED)

    def _failed(self, text: str) -> None:
        # Forgotten before it is said: whoever reads the status finds a machine that can try again.
        log.error("incoming migration failed: %s", text)
        self._machine.forget_incoming_state()
        self._attempt = None
        self.error_text = text
        self._status.move(MigrationStatus.FAILED)
        self._kept.forget()

    # ---- reports of the attempt's threads ----

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
            self._attempt.channel.shutdown()  # the source may not have noticed
        with contextlib.suppress(PageferryError):  # lost twice is lost
            self._status.move(MigrationStatus.POSTCOPY_PAUSED)


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
        for block in machine.ram.blocks:
            block.discard_all()  # nothing was preloaded: an untouched page is a page of zeroes
            block.use_huge_pages(not capabilities[Capability.POSTCOPY_RAM])
        reader = StreamReader(channel.read_fd, self.cancel.fd)
        self.loader = Loader(machine, reader, capabilities, postcopy, self, kept)

    def load(self) -> Outcome:
        """See `Loader.run`."""
        return self.loader.run()

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
        return self._return_path

    def listen(self, loader: Loader) -> None:
        """See `LoaderHost`. (mig/load, while it obeys LISTEN)"""
        if loader.return_path is None:
            raise PeerError("POSTCOPY_LISTEN without a return path")
        self._owner.listening()
        loader.receiver.struct.vcpu_thread = self._machine.vcpu_thread_id
        self.listener = ListenThread(self._machine.ram, loader, self._on_end, self._owner.lost)
        self.listener.start()

    def _on_end(self) -> None:
        self.postcopy.handle(PostcopyEvent.END)
        self._owner.ended(self)

    def finish(self) -> None:
        """The guest is ours: tell the source, close the channel."""
        self._shut(0)
        with contextlib.suppress(PageferryError, OSError):
            self.channel.finish()
        self.channel.close()

    def fail(self) -> None:
        """The guest did not start here, and will not: say so, while the channel still stands."""
        self._shut(1)
        self.cancel.set()
        if self.listener is not None:
            self.listener.abandon()
        self.channel.abort()
        self.channel.close()

    def give_up(self) -> None:
        """The process ends: make the threads end. Any thread."""
        self.cancel.set()
        if self.listener is not None:
            self.listener.give_up()

    def _shut(self, value: int) -> None:
        if self._return_path is None:
            return
        with contextlib.suppress(OSError, Cancelled):
            self._return_path.send(MessageWriter().write(Shut(value)))

    def join(self, timeout_s: float) -> bool:
        """Wait for mig/listen."""
        return self.listener is None or self.listener.join(timeout_s)

    def blocktime(self) -> Blocktime | None:
        """How long the guest was blocked, if there was a postcopy and the capability is on."""
        is_wanted = self._capabilities[Capability.POSTCOPY_BLOCKTIME] and self.listener is not None
        return self.loader.receiver.blocktime() if is_wanted else None

    def latency(self) -> FaultLatencies:
        """What waiting for pages has cost so far."""
        return self.loader.receiver.latency()
