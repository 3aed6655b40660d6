"""The guest's virtual clock: nanoseconds that pass only while the guest runs (QEMU's QEMU_CLOCK_VIRTUAL).

    running:  now = offset + host's monotonic clock         stopped:  now = offset

`offset` of the stopped clock is what the stream's `timer` section calls cpu_clock_offset
(QEMU 7.2 softmmu/cpu-timers.c: cpu_enable_ticks, cpu_disable_ticks).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["VirtualClock"]


class VirtualClock:
    """Stopped at 0 to begin with. Any thread may call any method."""

    def __init__(
        self,
        host_ns: Callable[[], int] = time.monotonic_ns,
        on_change: Callable[[int, bool], None] = lambda offset_ns, runs: None,
    ) -> None:
        """`on_change` hears of each start, stop and setting: the offset, and whether it runs."""
        self._host_ns = host_ns
        self._on_change = on_change
        self._lock = threading.Lock()  # protects both below, which change together
        self._offset = 0
        self._running = False

    def now_ns(self) -> int:
        """Guest time."""
        with self._lock:
            return self._offset + (self._host_ns() if self._running else 0)

    def start(self) -> None:
        """Let it run on from where it stands."""
        with self._lock:
            if not self._running:
                self._offset -= self._host_ns()
                self._running = True
                self._on_change(self._offset, True)

    def stop(self) -> None:
        """Let it stand still."""
        with self._lock:
            if self._running:
                self._offset += self._host_ns()
                self._running = False
                self._on_change(self._offset, False)

    @property
    def offset(self) -> int:
        """cpu_clock_offset as it is now: while stopped, the guest's time."""
        with self._lock:
            return self._offset

    @offset.setter
    def offset(self, value: int) -> None:
        with self._lock:
            self._offset = value
            self._on_change(value, self._running)
