"""Timers on the guest's virtual clock: devices ask to be called at an instant of guest time.

    set(at_ns) --> the thread "timers" sleeps until then --> callback

Rules
1. Nothing is called while the clock stands: after `pause` has returned no callback runs until `resume`.
2. A callback does not wait, and may set timers, its own too.
3. Where the time is already over the callback comes at once, on the thread, never inside of `set`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from vmm.clock import VirtualClock

__all__ = ["Timer", "Timers"]

log = logging.getLogger(__name__)


class Timer:
    """One instant, or none. Made by `Timers.timer`."""

    def __init__(self, owner: Timers, callback: Callable[[], None]) -> None:
        self._owner = owner
        self.callback = callback
        self.at_ns: int | None = None

    def set(self, at_ns: int | None) -> None:
        """Call back at this guest time, or not at all. Any thread."""
        self._owner.set(self, at_ns)


class Timers:
    """All timers of a machine; stopped to begin with. The thread starts with the first timer that is set."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # protects the rest, and the timers' instants
        self._calling = threading.Lock()  # held around a callback; taken before `_changed`, never after it
        self._timers: list[Timer] = []
        self._running = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new timer, not set."""
        timer = Timer(self, callback)
        self._timers.append(timer)
        return timer

    def set(self, timer: Timer, at_ns: int | None) -> None:
        """See `Timer.set`."""
        with self._changed:
            timer.at_ns = at_ns
            if at_ns is not None and self._running:
                self._start_thread()
                self._changed.notify()

    def resume(self) -> None:
        """The clock runs."""
        with self._changed:
            self._running = True
            if any(timer.at_ns is not None for timer in self._timers):
                self._start_thread()
            self._changed.notify()

    def pause(self) -> None:
        """The clock has stopped; waits for a callback under way."""
        with self._changed:
            self._running = False
        with self._calling:
            pass

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread; False if it did not end in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _start_thread(self) -> None:
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._main, name="timers", daemon=True)
            self._thread.start()

    # ---- the thread "timers"

    def _main(self) -> None:
        while self._wait():
            with self._calling:
                for timer in self._due():
                    try:
                        timer.callback()
                    except Exception:
                        log.exception("a timer's callback has failed")

    def _wait(self) -> bool:
        """Until a timer is due; False when the thread shall end."""
        with self._changed:
            while not self._closing:
                if not self._running:
                    self._changed.wait()
                    continue
                first = min((t.at_ns for t in self._timers if t.at_ns is not None), default=None)
                rest_ns = None if first is None else first - self._clock.now_ns()
                if rest_ns is not None and rest_ns <= 0:
                    return True
                self._changed.wait(None if rest_ns is None else rest_ns / 1e9)
            return False

    def _due(self) -> list[Timer]:
        with self._changed:
            if not self._running:
                return []
            now_ns = self._clock.now_ns()
            due = [timer for timer in self._timers if timer.at_ns is not None and timer.at_ns <= now_ns]
            for timer in due:
                timer.at_ns = None
            return due
