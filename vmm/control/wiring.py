"""Puts the control side together: schema, hub, handlers, and the events of other threads.

machine, migrator --notify on any thread--> EventForwarder --on the loop--> EventHub --> clients
clients --> Dispatcher --> handlers --> machine, migrator
"""

from __future__ import annotations

import asyncio
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


class EventForwarder:
    """Takes events on any thread and emits them on the loop's, in the order they came.

    On the loop's thread an event is emitted at once, after those that wait: so the events that a command
    causes are sent before its reply. The timestamp is that of the call.
    """

    def __init__(self, hub: EventHub, loop: asyncio.AbstractEventLoop) -> None:
        """Create it on the thread that runs, or will run, the loop."""
        self._hub = hub
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._waiting: deque[tuple[str, dict[str, Any], float]] = deque()

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        """Notify."""
        self._waiting.append((name, data, self._hub.now()))
        if threading.get_ident() == self._thread_id:
            self._drain()
            return
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            _log.debug("Event %s came after the loop was closed", name)

    def _drain(self) -> None:
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

    def power_down() -> None:
        machine.press_power_button()
        hub.emit("POWERDOWN")

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
