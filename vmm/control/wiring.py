"""Puts the control side together: schema, hub, handlers, and the events of other threads.

machine, migrator --notify on any thread--> EventForwarder --on the loop--> EventHub --> clients
clients --> Dispatcher --> handlers --> machine, migrator
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qmp.dispatcher import Dispatcher
from qmp.events import EventHub
from vmm.control import absent, block, char, control, dump, introspect, memory, migration, run_state
from vmm.control import machine as machine_commands
from vmm.control.human import HumanMonitor
from vmm.control.human_info import InfoSources
from vmm.control.interfaces import DiskView, MachineControl, MigratorControl
from vmm.control.vocabulary import BANNER, VERSION, Vocabulary, make_vocabulary

__all__ = ["BANNER", "VERSION", "Control", "EventForwarder", "build_control"]

_log = logging.getLogger(__name__)


BUNCH_S = 0.002
"""Events that come sooner after others are emitted together; arbitrary."""

HOLD_S = 0.01
"""How long the loop keeps away from a hand-over, which takes a few ms. For an event it takes the GIL from the
threads that do it, and the client that reads it takes a core."""


class EventForwarder:
    """Takes events on any thread and emits them on the loop's, in the order they came.

    The first wakes the loop, those behind it within `BUNCH_S` wait for its next look. On the loop's thread an
    event is emitted at once, after those that wait; and a reply is sent after `deliver`: so what has happened
    before a reply is told before it. The timestamp is that of the call.
    """

    def __init__(self, hub: EventHub, loop: asyncio.AbstractEventLoop) -> None:
        """Create it on the thread that runs, or will run, the loop."""
        self._hub = hub
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._waiting: deque[tuple[str, dict[str, Any], float]] = deque()
        self._held_until_s = 0.0
        self._is_looking = False
        """Will the loop look again? Set by who wakes it; cleared by the loop, which looks once more then."""

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        """Notify."""
        self._waiting.append((name, data, self._hub.now()))
        if threading.get_ident() == self._thread_id:
            self.deliver()
            return
        if self._is_looking:
            return
        self._is_looking = True
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:
            _log.debug("Event %s came after the loop was closed", name)

    def hold(self) -> None:
        """A guest is about to change hands: emit nothing for `HOLD_S`, except before a reply. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._hold)

    def _hold(self) -> None:
        self._held_until_s = self._loop.time() + HOLD_S
        self._is_looking = True
        self._look()

    def _look(self) -> None:
        if self._loop.time() < self._held_until_s:
            self._loop.call_at(self._held_until_s, self._look)
            return
        self._is_looking = False
        if self._waiting:
            self._is_looking = True
            self._loop.call_later(BUNCH_S, self._look)  # first: whoever is told may raise
            self.deliver()

    def deliver(self) -> None:
        """Emit what waits. On the loop's thread."""
        while self._waiting:
            name, data, time_s = self._waiting.popleft()
            self._hub.emit(name, data, time_s=time_s)


def _vcpu_thread_ids() -> list[int]:
    """The kernel's ids of the vCPU threads, known by their name."""
    threads = (thread for thread in threading.enumerate() if thread.name.startswith("vcpu"))
    return [thread.native_id for thread in threads if thread.native_id is not None]


@dataclass(frozen=True)
class Control:
    """The control side of one process: give `dispatcher` and `hub` to a `qmp.server.QmpServer`.

    `notify` is what the migrator and whoever else has events calls; the machine's are connected already.
    """

    dispatcher: Dispatcher
    hub: EventHub
    human: HumanMonitor
    notify: EventForwarder


def build_control(
    machine: MachineControl,
    migrator: MigratorControl,
    *,
    loop: asyncio.AbstractEventLoop,
    vocabulary: Vocabulary | None = None,
    cpu_thread_ids: Callable[[], Sequence[int]] = _vcpu_thread_ids,
    chardevs: Callable[[], list[dict[str, Any]]] = list,
    disks: Callable[[], Sequence[DiskView]] = list,
) -> Control:
    """Make the dispatcher and the hub. Call it on the loop's thread.

    `vocabulary` is what open monitors have been given. `chardevs` gives the ChardevInfo of query-chardev,
    `disks` what query-block shows. A migrator that wants its `notify` before this returns is given one that
    looks it up late: `lambda name, data: control.notify(name, data)`.
    """
    vocabulary = vocabulary or make_vocabulary()
    dispatcher, hub = vocabulary.dispatcher, vocabulary.hub
    notify = EventForwarder(hub, loop)
    machine.add_listener(notify)
    machine.on_hand_over_soon = notify.hold

    def power_down() -> None:
        machine.press_power_button()
        notify("POWERDOWN", {})

    dispatcher.before_reply = notify.deliver
    human = HumanMonitor(
        machine,
        migrator,
        InfoSources(machine, migrator, VERSION, cpu_thread_ids, chardevs),
        power_down,
    )
    for table in (
        control.handlers(dispatcher, machine, human),
        introspect.handlers(dispatcher),
        run_state.handlers(machine, migrator, power_down),
        machine_commands.handlers(machine, cpu_thread_ids),
        memory.handlers(machine, dispatcher.fdsets),
        dump.handlers(machine, migrator, dispatcher.fdsets, notify),
        absent.handlers(),
        char.handlers(chardevs),
        block.handlers(disks),
        migration.handlers(migrator),
    ):
        for name, handler in table.items():
            dispatcher.register(name, handler)
    return Control(dispatcher, hub, human, notify)
