"""The single-runner oracle: whatever breaks, one guest lives one life, on one machine at a time.

    consoles of all machines --> one collector, in the order in which it was said --> audit
    run states of all machines ----------------------------------------------------> never two that run

An auditor counts its rounds in a register and says each one once. Two machines that both run it say a round
twice; one that runs a stale copy says an old one; on none the rounds stand still. So the collected text must
be that of a guest that never moved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tools.guest_checks import Verdict, audit

__all__ = ["Collector", "DoubleRun", "NoRunner", "Runner", "SingleRunner", "check_one_life"]

RUNNING = "running"


class DoubleRun(AssertionError):
    """The guest runs, or has run, on two machines."""


class NoRunner(AssertionError):
    """The guest should run, and does not get on."""


def check_one_life(*outputs: str) -> Verdict:
    """The verdict on the whole life, from the consoles in the order of the machines. Raises DoubleRun."""
    verdict = audit(*outputs)
    if verdict.went_backwards:
        said = "\n---\n".join(text[-400:] for text in outputs)
        raise DoubleRun(f"A part of the guest's life was lived twice: {verdict}\n{said}")
    return verdict


class Collector:
    """All that the consoles say, in one text."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._parts: list[tuple[str, int]] = []
        self._lock = threading.Lock()

    def console(self, name: str) -> _Console:
        """A sink for the serial port of one machine."""
        return _Console(self, name)

    def take(self, name: str, data: bytes) -> None:
        """Called by the machine that says it, before its guest goes on: the order is that of the lives."""
        with self._lock:
            if not self._parts or self._parts[-1][0] != name:
                self._parts.append((name, len(self._said)))
            self._said += data

    @property
    def text(self) -> str:
        """Everything so far."""
        with self._lock:
            return self._said.decode("latin-1")

    @property
    def speakers(self) -> list[str]:
        """Who spoke, in turn: two machines that both run alternate."""
        with self._lock:
            return [name for name, _ in self._parts]


class _Console:
    """The outside of a serial port. Fits `CharSink`."""

    def __init__(self, collector: Collector, name: str) -> None:
        self._collector = collector
        self._name = name

    def write_nowait(self, data: bytes) -> int:
        self._collector.take(self._name, data)
        return len(data)

    def accept_input(self) -> None:
        """There is no input."""

    def wait_flushed(self, timeout_s: float, /) -> bool:
        del timeout_s
        return True


class Speaking(Protocol):
    """What has a text that grows: a collector, or one that reads a file."""

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Runner:
    """A machine under watch; `run_state` asks it."""

    name: str
    run_state: Callable[[], str]


class SingleRunner:
    """Watches machines among which one guest moves; the newest last."""

    def __init__(self, collector: Speaking, runners: Sequence[Runner]) -> None:
        self._collector = collector
        self._runners = list(runners)

    def running(self) -> str | None:
        """Which machine says that it runs the guest, None if none does. Raises DoubleRun."""
        # The newest first: a guest moves to it, so that the one before is asked when it must have stopped.
        found = [each.name for each in reversed(self._runners) if each.run_state() == RUNNING]
        if len(found) > 1:
            raise DoubleRun(f"{' and '.join(found)} both run\n{self._collector.text[-400:]}")
        return found[0] if found else None

    def check(self) -> Verdict:
        """One life so far, and nothing wrong in it. Raises DoubleRun, AssertionError."""
        text = self._collector.text
        verdict = check_one_life(text)
        is_whole = not (verdict.complaints or verdict.strange or verdict.error_count)
        assert is_whole, f"{verdict}\n{text[-600:]}"
        return verdict

    def check_lives(self, more: int = 2, deadline_s: float = 60.0) -> str:
        """The guest runs somewhere, gets on, and is whole; where.

        Raises NoRunner, DoubleRun, AssertionError.
        """
        before = self.check().heartbeats
        end_s = time.monotonic() + deadline_s
        while self.check().heartbeats < before + more:
            if time.monotonic() > end_s:
                where = self.running() or "none"
                raise NoRunner(f"no word from the guest in {deadline_s} s; {where} runs it")
            time.sleep(0.0005)
        runner = self.running()
        if runner is None:
            raise NoRunner("the guest speaks, and no machine says that it runs")
        return runner
