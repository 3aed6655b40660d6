"""One connected QMP client on the asyncio loop: moves bytes between its wire and its session.

asyncio's own transports drop descriptors that come with the bytes, so the descriptors are watched with
`add_reader` and `add_writer` directly. Rules:

1. Nothing is read from a client while its in-flight queue is full, or while more than 1 MiB of output waits
   for it. Events cannot be held back: a client that lets 128 KiB of them pile up is disconnected.
2. A client that sends many commands at once gives way to others, see `turns`.
3. After end of file the commands already received are answered; then the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from qmp.awake import Awake
from qmp.dispatcher import Dispatcher
from qmp.events import EventHub
from qmp.fds import FdStore
from qmp.session import Session
from qmp.turns import TURN_S, Turns
from qmp.wire import Wire, is_pollable

__all__ = ["HIGH_WATER_BYTES", "Connection"]

_log = logging.getLogger(__name__)

HIGH_WATER_BYTES: Final = 1 << 20
EVENT_BYTES: Final = 128 << 10
"""Of events that may wait for one client. Arbitrary: a thousand, more than a migration sends; the kernel's
buffer holds as much again, and a hundred clients that do not read cost 13 MB."""


class Connection:
    """A client, from its greeting to its end. Create it on the running loop."""

    def __init__(
        self,
        wire: Wire,
        dispatcher: Dispatcher,
        hub: EventHub,
        *,
        pretty: bool = False,
        held: bool = False,
        turns: Turns | None = None,
    ) -> None:
        """`held`: greet, but execute and read nothing before `release`. `turns` is shared with others."""
        self.session = Session(dispatcher.greeting, pretty=pretty)
        self.fds = FdStore(dispatcher.fdsets)
        self._wire = wire
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._turns = turns or Turns(self._loop)
        self._awake = Awake(wire.input_fd)
        self._waits_for_turn = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._out = bytearray()
        self._event_bytes = 0  # of events, since all output was last sent
        self._input_pollable = is_pollable(wire.input_fd)
        self._output_pollable = is_pollable(wire.output_fd)
        self._reading = False
        self._writing = False
        self._pumping = False
        self._held = held
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._unsubscribe = hub.subscribe(self._on_event)
        self._flush()
        self._pump()

    @property
    def is_closed(self) -> bool:
        """Whether the connection is gone."""
        return self._closed.done()

    async def wait_closed(self) -> None:
        """Wait for the end of the connection, whoever ends it."""
        await asyncio.shield(self._closed)

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Have the loop call back once the connection is gone."""
        self._closed.add_done_callback(lambda _: callback())

    def release(self) -> None:
        """Begin to read and execute."""
        self._held = False
        self._pump()

    async def close(self, flush_s: float = 1.0) -> None:
        """Send what waits, for at most `flush_s` seconds, then disconnect."""
        self._closing = True
        self._watch_input(False)
        self._flush()
        if not self.is_closed and not self._out:
            self.abort()
        try:
            await asyncio.wait_for(self.wait_closed(), flush_s)
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Disconnect now; output that waits is lost, descriptors not taken are closed."""
        if self.is_closed:
            return
        self._watch_input(False)
        self._watch_output(False)
        self._unsubscribe()
        self.fds.close()
        self._wire.close()
        self._closed.set_result(None)

    # Section: input and execution

    def _on_readable(self) -> None:
        self._awake.begin_turn()
        while self._read() and self._reading and not self._tasks and self._awake.hears_more():
            pass

    def _read(self) -> bool:
        """Read once and execute; False if nothing came."""
        try:
            data, fds = self._wire.read()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            _log.info("QMP client lost: %s", error)
            self.abort()
            return False
        self.fds.receive(fds)
        if data:
            self.session.receive_data(data)
        else:
            self.session.receive_eof()
        self._pump()
        return True

    def _take_turn(self) -> None:
        self._waits_for_turn = False
        self._pump(TURN_S)

    def _pump(self, turn_s: float | None = None) -> None:
        """Execute what can be executed now, send the answers, and decide whether to read on."""
        if self.is_closed or self._pumping or self._closing or self._held:
            return
        self._pumping = True
        drained = False
        deadline_s = time.monotonic() + (self._turns.first_turn_s if turn_s is None else turn_s)
        while self._unsent_bytes() <= HIGH_WATER_BYTES and not self.is_closed:
            request = self.session.next_request()
            if request is None:
                drained = not self.session.is_paused
                break
            unfinished = self._dispatcher.execute(self, request)
            if unfinished is not None:
                self._run(unfinished)
            if time.monotonic() > deadline_s:
                # Who has no more to be executed must not stand in the queue: it is not read meanwhile.
                drained = not self.session.has_waiting
                break
        self._pumping = False
        self._flush()
        if self.is_closed or self._closing:
            return
        if drained and self.session.is_finished and not self._tasks:
            self._closing = True
            if not self._out:
                self.abort()
            return
        if not drained and len(self._out) <= HIGH_WATER_BYTES and not self._waits_for_turn:
            self._waits_for_turn = True
            self._turns.later(self._take_turn)
        self._watch_input(drained and self.session.wants_data and len(self._out) <= HIGH_WATER_BYTES)

    def _run(self, unfinished: Awaitable[None]) -> None:
        task = asyncio.ensure_future(unfinished)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._closing:
            self._flush()
        self._pump()

    def _on_event(self, event: dict[str, object], line: bytes) -> None:
        self.session.send_event(event, line)
        self._event_bytes += len(line)
        if self._event_bytes > EVENT_BYTES:
            _log.warning("QMP client does not read its events, disconnected")
            self.abort()
        elif not self._pumping:
            self._flush()

    # Section: output

    def _unsent_bytes(self) -> int:
        return len(self._out) + self.session.unsent_bytes

    def _flush(self) -> None:
        """Send what the socket takes; watch it for the rest."""
        if self.is_closed:
            return
        session, out = self.session, self._out
        try:
            if not out:
                if session.unsent_bytes:
                    data = session.data_to_send()
                    out += data  # what is not sent stays
                    sent = self._wire.write(data)
                    if sent == len(data):
                        out.clear()
                    else:
                        del out[:sent]
            else:
                if session.unsent_bytes:
                    out += session.data_to_send()
                with memoryview(out) as view:
                    sent = self._wire.write(view)
                del out[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            _log.info("QMP client lost: %s", error)
            self.abort()
            return
        if not self._out:
            self._event_bytes = 0
        self._watch_output(bool(self._out))

    def _on_writable(self) -> None:
        self._flush()
        if self._closing:
            if not self._out:
                self.abort()
        elif len(self._out) <= HIGH_WATER_BYTES:
            self._pump()

    # Section: watching

    def _watch_input(self, wanted: bool) -> None:
        if wanted == self._reading:
            return
        self._reading = wanted
        if not self._input_pollable:
            if wanted:
                self._loop.call_soon(self._read_file)
        elif wanted:
            self._loop.add_reader(self._wire.input_fd, self._on_readable)
        else:
            self._loop.remove_reader(self._wire.input_fd)

    def _read_file(self) -> None:
        """A regular file as input: always readable, so a turn of the loop for each read."""
        if self._reading and not self.is_closed:
            self._reading = False
            self._on_readable()

    def _watch_output(self, wanted: bool) -> None:
        if wanted == self._writing:
            return
        self._writing = wanted
        if not self._output_pollable:
            if wanted:
                self._loop.call_soon(self._on_writable)
            self._writing = False
        elif wanted:
            self._loop.add_writer(self._wire.output_fd, self._on_writable)
        else:
            self._loop.remove_writer(self._wire.output_fd)
