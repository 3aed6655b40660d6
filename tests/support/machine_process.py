"""A machine with its migrator in a process of its own that can be killed: forked from a warm one, in 10 ms.

What `real_machines.Side` is in this process; QMP is missing. All consoles are one file that is appended to,
so that the kernel keeps the order in which the machines spoke. The machine ends with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from tests.support.cut_trial import APPEND, MEMORY_BYTES
from tests.support.real_machines import Side

__all__ = ["ConsoleFile", "Gone", "MachineProcess"]

ANSWER_S = 10.0
WARM = ("tests.support.real_machines", "tests.support.cut_trial", "uffd", "vmm.machine")


class Gone(AssertionError):
    """The process has ended, or does not answer."""


class ConsoleFile:
    """Where all consoles write; fits `oracle.Speaking`."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.touch()

    @property
    def text(self) -> str:
        """Everything so far."""
        return self.path.read_text(encoding="latin-1")


class MachineProcess:
    """One machine; `call` asks it, `kill` ends it."""

    def __init__(self, name: str, console: ConsoleFile, *, incoming: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(WARM))
        self.name = name
        self._errors = console.path.with_name(f"errors-{name}")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, str(console.path), str(self._errors), incoming), daemon=True
        )
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """What `_Served` answers. Raises Gone, or AssertionError with the traceback there."""
        try:
            self._pipe.send((name, arguments))
            if not self._pipe.poll(ANSWER_S):
                raise Gone(f"{self.name} does not answer {name}")
            good, answer = self._pipe.recv()
        except (OSError, EOFError) as error:
            raise Gone(f"{self.name} is gone") from error
        assert good, f"{self.name}: {name}{arguments}:\n{answer}"
        return answer

    def signal(self, number: int) -> None:
        """SIGSTOP, SIGCONT, SIGKILL."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    @staticmethod
    def stop_server() -> None:
        """End what the machines are forked from, and what Python starts beside it."""
        # Python offers no public way, and its own tests take this one.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # not in typeshed
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # not in typeshed

    def kill(self) -> str:
        """End it, whatever it does; what it wrote to the standard error."""
        if self._process.is_alive():
            self.signal(signal.SIGKILL)
        self._process.join()
        self._pipe.close()
        said = self._errors.read_text(errors="replace")
        self._process.close()
        return said


class _Appending:
    """A console into the file. Fits `CharSink`."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write_nowait(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def accept_input(self) -> None:
        """There is no input."""

    def wait_flushed(self, timeout_s: float, /) -> bool:
        del timeout_s
        return True


class _Served:
    """What may be asked, in the process of the machine."""

    def __init__(self, console: str, incoming: bool) -> None:
        self.side = Side("auditor", APPEND, memory=MEMORY_BYTES, incoming=incoming, paused=not incoming)
        self.side.machine.devices.serial.sink = _Appending(console)
        self.side.capability("postcopy-ram")

    def state(self) -> tuple[str, str, str, str]:
        """Run state, status as a source, status as a destination, error."""
        migrator, machine = self.side.migrator, self.side.machine
        source, destination = migrator._source_status.status, migrator._incoming_status.status
        return str(machine.run_state), source.value, destination.value, self.side.error

    def migrator(self, name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.side.migrator, name)(*arguments, **options)

    def resume(self, uri: str) -> None:
        self.side.migrator.migrate(uri, resume=True)

    def cont(self) -> None:
        self.side.machine.cont()

    def is_whole(self) -> bool:
        return not self.side.migrator.has_missing_pages

    def memory(self) -> bytes:
        return self.side.machine.ram.blocks[0].read(0, MEMORY_BYTES)

    def pause(self) -> None:
        self.side.pause()


def _serve(pipe: Connection, console: str, errors: str, incoming: bool) -> None:
    sys.setswitchinterval(0.0002)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    served = _Served(console, incoming)
    try:
        while True:
            name, arguments = pipe.recv()
            answer: Callable[..., Any] = getattr(served, name)
            try:
                pipe.send((True, answer(*arguments)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone: no page that is missing may be touched on the way out
