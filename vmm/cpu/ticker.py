"""The thread that has the guest's timer interrupt a vCPU that runs.

A halted vCPU takes its ticks itself; while it is halted this thread sleeps. All of it is C (vmm/cpu/tick.c).
"""

from __future__ import annotations

import threading

from vmm.cpu.engine import Engine

__all__ = ["Ticker"]


class Ticker:
    """The thread "tick" of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = threading.Thread(target=engine.serve_ticks, name="tick", daemon=True)

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread; False if it did not end in time."""
        if self._thread.ident is None:
            return True
        self._engine.end_ticks()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
