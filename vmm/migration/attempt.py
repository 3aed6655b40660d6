"""One source at the destination: its stream, its return path, and the guest that comes out of it.

    load -> (started) -> finish                      precopy
    load -> LISTEN: mig/listen -> on_end -> finish   postcopy
                       |    ^
               on_lost v    | on_recover, on_resume
                     paused: `recover` brings a new channel
    fail: nothing of it is left

What is decided here is said to the owner, which has the status. Source: QEMU 7.2 migration/migration.c.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

from vmm.errors import PageferryError
from vmm.migration import channel as channels
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.compression import why_not
from vmm.migration.errors import Cancelled, LostPages, MigrationError, PeerError
from vmm.migration.hand_over import Orders, StartOrder
from vmm.migration.listen import ListenThread
from vmm.migration.loader import Loader, Outcome
from vmm.migration.multifd_receive import MultifdReceiver
from vmm.migration.page_pump.receiver import PageReceiver, ReturnPathWriter
from vmm.migration.params import Capabilities, Capability, Parameters
from vmm.migration.peer import ALIVE_MAGIC
from vmm.migration.postcopy_state import PostcopyEvent, PostcopyState, PostcopyStateMachine
from vmm.migration.recovery import DestinationRecovery
from vmm.migration.return_path import Message, MessageWriter, Pong, Shut, Started
from vmm.migration.silence import SilenceWatch

if TYPE_CHECKING:
    from vmm.migration.blocktime import Blocktime
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.kept import KeptState
    from vmm.migration.stats import FaultLatencies

__all__ = ["Attempt", "AttemptOwner"]


class AttemptOwner(Protocol):
    """The destination: what it is told, and asked."""

    def peer_timeout_ms(self) -> int:
        """How long the source may be silent, in ms; 0: for ever."""

    def name(self, migration: bytes) -> StartOrder:
        """The source has given its migration a name; raises MigrationError if that was here before."""

    def listening(self) -> None:
        """LISTEN was obeyed: pages come on demand from now on."""

    def ended(self, attempt: Attempt) -> None:
        """Every page is here and the RAM is plain memory again. (mig/listen)"""

    def lost(self, text: str) -> None:
        """The channel is lost, or what came is wrong; pages are missing. (mig/listen)"""

    def recovering(self) -> None:
        """A source is there again. (mig/listen)"""

    def resumed(self) -> None:
        """Recovery is agreed. (mig/listen)"""

    def dead(self, text: str) -> None:
        """Faults are not served any more. (mig/listen)"""


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


class Attempt:
    """What exists only while one source is being listened to."""

    def __init__(
        self,
        owner: AttemptOwner,
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
        self._previous: list[channels.Channel] = []
        """Those before, closed one recovery later: nobody is inside a last write to them then. None is closed
        while mig/load may still answer from inside the package."""
        self._visit: _Visit | None = None
        self._watch: SilenceWatch | None = None
        self._silence: str | None = None
        self._multifd: MultifdReceiver | None = None
        for block in machine.ram.blocks:
            block.use_huge_pages(not capabilities[Capability.POSTCOPY_RAM])
        reader = StreamReader(channel.read_fd, self.cancel.fd)
        # Weak: what an ended attempt holds is freed with it, not when Python looks for cycles.
        self.loader = Loader(machine, reader, capabilities, postcopy, weakref.proxy(self), kept)

    def load(self) -> Outcome:
        """See `Loader.run`; and the guest may be started, if the source has a word in that."""
        try:
            outcome = self.loader.run()
        except (PageferryError, OSError):
            if self._multifd is not None:
                self._multifd.check()  # that the main stream ended may be because of it
            if self.loader.order is not None:
                self.loader.order.check()  # a device that read what never came is not the reason
            raise
        finally:
            self._end_multifd()
        if outcome is Outcome.COMPLETE:
            self.check_complete()
        self.loader.await_start(outcome)
        return outcome

    def open_multifd(self, parameters: Parameters) -> None:
        """Take pages from the other channels, too, if there are any. Raises MigrationError."""
        if not self.channel.more:
            return
        method, uuid = parameters["multifd-compression"], self._machine.config.uuid
        reason = why_not(method)
        if reason is not None:
            raise MigrationError(reason)
        fds = [channel.read_fd for channel in self.channel.more]
        ours = None if uuid is None else uuid.bytes
        # Bound to the channel, not to us: no cycle.
        on_error = self.channel.shutdown
        self._multifd = MultifdReceiver(fds, self.cancel.fd, method=method, uuid=ours, on_error=on_error)

    def end_of_section(self, receiver: PageReceiver) -> None:
        """See `LoaderHost`."""
        if self._multifd is not None:
            self._multifd.sync(receiver)

    def _shut_multifd(self) -> None:
        for channel in self.channel.more:
            channel.shutdown()

    def _end_multifd(self) -> None:
        if self._multifd is not None:
            self._multifd.close(self._shut_multifd)
            self._multifd = None

    def name(self, migration: bytes) -> StartOrder:
        """See `LoaderHost`."""
        self._machine.on_hand_over_soon()
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

    def arm(self, loader: Loader) -> None:
        """See `LoaderHost`. (mig/load)"""
        if loader.return_path is None:
            raise PeerError("POSTCOPY_LISTEN without a return path")
        self._machine.on_hand_over_soon()
        loader.receiver.struct.vcpu_thread = self._machine.vcpu_thread_id
        self.listener = ListenThread(self._machine.ram, loader, weakref.proxy(self))
        self.listener.arm()

    def listen(self, loader: Loader) -> None:
        """See `LoaderHost`. (mig/load, while it obeys LISTEN)"""
        if self.listener is None:
            self.arm(loader)
        assert self.listener is not None, "it is armed"
        self._owner.listening()
        self._use_second()
        self.listener.listen()

    def _use_second(self) -> None:
        second = self.channel.second
        if second is not None:
            self.loader.receiver.preempt_channel(StreamReader(second.read_fd, self.cancel.fd))

    # ---- ListenHost, on mig/listen ----

    def on_end(self) -> None:
        self.postcopy.handle(PostcopyEvent.END)
        self._owner.ended(self)

    def on_lost(self, text: str) -> None:
        self._owner.lost(self.why(text))
        self._end_visit(resumed=False)

    def on_recover(self) -> None:
        visit = self._visit
        assert visit is not None, "mig/listen takes what `recover` gives it"
        self._return_path = visit.return_path
        if self.listener is not None and self.listener.package_is_loaded:
            self._close_previous()
        with self._cut_lock:
            self._previous.append(self.channel)
            self.channel = visit.channel
        self._owner.recovering()

    def on_resume(self) -> None:
        self._use_second()  # not before: a stranger may have opened it
        self._owner.resumed()
        self._end_visit(resumed=True)

    def on_dead(self, text: str) -> None:
        self._owner.dead(text)
        self._end_visit(resumed=False)

    def _end_visit(self, *, resumed: bool) -> None:
        visit, self._visit = self._visit, None
        if visit is not None:
            visit.end(resumed=resumed)

    def recover(self, channel: channels.Channel, reader: StreamReader, orders: Orders) -> bool:
        """Go on over `channel`; True once both sides have agreed, False if it broke before. (mig/recover)"""
        assert self.listener is not None, "only a postcopy is paused"
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
            self._close_previous()

    def _close_previous(self) -> None:
        for channel in self._previous:
            channel.close()
        self._previous = []

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
