"""Handlers of schema/dump.json: guest memory and the CPU's state as an ELF core file.

    loop: handler --> vCPU held --> thread "dump": head, RAM piece by piece --> loop: DUMP_COMPLETED, reply

The vCPU stands still meanwhile, the monitor does not: the file may be a pipe that nobody reads. A page that
is still at a migration source ends the dump with an error, and none is begun while a migration is under way,
nor does one go on: pages of a guest that leaves may be given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from qmp.dispatcher import Call, Handler
from qmp.errors import GenericError
from qmp.fdsets import FdSets
from vmm.control.core_file import core_head
from vmm.control.interfaces import MachineControl, MigratorControl, Notify
from vmm.control.refusals import refusal_text
from vmm.errors import MachineError

__all__ = ["handlers"]

PIECE_BYTES: Final = 1 << 20
"""Arbitrary: a millisecond's work."""
CPU_WAIT_S: Final = 0.005
"""How long the vCPU is waited for. One that waits for a page stays where it is."""
UNDER_WAY: Final = (
    *("setup", "active", "device", "cancelling", "pre-switchover", "wait-unplug"),
    *("postcopy-active", "postcopy-paused", "postcopy-recover"),
)


@dataclass
class _Progress:
    status: str = "none"
    completed: int = 0
    total: int = 0

    def shown(self) -> dict[str, Any]:
        """DumpQueryResult."""
        return {"status": self.status, "completed": self.completed, "total": self.total}


class _Dumper:
    """One dump at a time; `progress` is the latest's."""

    def __init__(
        self, machine: MachineControl, migrator: MigratorControl, fdsets: FdSets, notify: Notify
    ) -> None:
        self._machine = machine
        self._migrator = migrator
        self._fdsets = fdsets
        self._notify = notify
        self.progress = _Progress()

    def start(self, call: Call) -> asyncio.Future[None]:
        """Begin; the future ends with the dump. Raises GenericError, MachineError."""
        if self.progress.status == "active":
            raise GenericError("There is a dump in process, please wait.")
        _check(call.arguments)
        self._check_migration()
        fd = self._open(call)
        held = contextlib.ExitStack()
        try:
            cpu = held.enter_context(self._machine.vcpu_held(CPU_WAIT_S))
        except BaseException:
            os.close(fd)
            raise
        regions = self._machine.ram.regions
        head = core_head(cpu, regions)
        self.progress = _Progress("active", 0, sum(length for _, length in regions))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def write() -> None:
            error: Exception | None = None
            try:
                with held, open(fd, "wb", buffering=0) as file:
                    for piece in self._pieces(head):
                        _write_all(file.fileno(), piece)
            except Exception as failure:
                error = failure
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(self._ended, done, error)

        threading.Thread(target=write, name="dump", daemon=True).start()
        return done

    def _check_migration(self) -> None:
        if self._machine.run_state == "inmigrate":
            raise MachineError("Dump not allowed during incoming migration.")
        if self._migrator.query().get("status") in UNDER_WAY:
            raise MachineError("Dump not allowed while a migration is under way")

    def _pieces(self, head: bytes) -> Iterator[bytes]:
        yield head
        for address, length in self._machine.ram.regions:
            for offset in range(0, length, PIECE_BYTES):
                self._check_migration()
                size = min(PIECE_BYTES, length - offset)
                yield self._machine.ram.read(address + offset, size)
                self.progress.completed += size

    def _ended(self, done: asyncio.Future[None], error: Exception | None) -> None:
        self.progress.status = "failed" if error else "completed"
        data: dict[str, Any] = {"result": self.progress.shown()}
        if error is not None:
            data["error"] = refusal_text(error) or repr(error)
        self._notify("DUMP_COMPLETED", data)
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _open(self, call: Call) -> int:
        kind, _, where = call.arguments["protocol"].partition(":")
        if kind == "fd":
            return call.client.fds.take(where)
        if kind != "file":
            raise GenericError("Invalid parameter 'protocol'")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._fdsets.resolve(where, flags), flags, 0o600)
        except OSError as error:
            raise MachineError(f"Could not open '{where}': {error.strerror}") from error
        os.set_blocking(fd, True)
        return fd


def _check(arguments: dict[str, Any]) -> None:
    """What of QEMU's arguments is not there. Raises GenericError."""
    if arguments["paging"]:
        raise GenericError("Parameter 'paging' expects false: guest page tables are not followed")
    for name in ("begin", "length"):
        if name in arguments:
            raise GenericError(f"Parameter '{name}' is not supported: all of memory is dumped")
    if arguments.get("format", "elf") != "elf":
        raise GenericError("Parameter 'format' expects 'elf'")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def handlers(
    machine: MachineControl, migrator: MigratorControl, fdsets: FdSets, notify: Notify
) -> dict[str, Handler]:
    """Command name -> handler."""
    dumper = _Dumper(machine, migrator, fdsets, notify)

    def dump(call: Call) -> asyncio.Future[None] | None:
        done = dumper.start(call)
        if not call.arguments.get("detach", False):
            return done
        done.add_done_callback(lambda ended: ended.exception())  # told of by DUMP_COMPLETED
        return None

    return {
        "dump-guest-memory": dump,
        "query-dump": lambda call: dumper.progress.shown(),
        "query-dump-guest-memory-capability": lambda call: {"formats": ["elf"]},
    }
