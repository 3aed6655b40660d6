"""A device's own thread: what must not hold up the vCPU, or may wait for a page while the loop may not.

    request() --> the thread calls `function` until it has nothing to do --> idle

Rules: `function` is called on the thread only, never twice at a time; it gives True while it wants to be
called again. After `wait_idle` has given True it does not run until the next request.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

__all__ = ["Worker"]

log = logging.getLogger(__name__)


class Worker:
    """The thread starts with the first request."""

    def __init__(self, name: str, function: Callable[[], bool]) -> None:
        self._name = name
        self._function = function
        self._changed = threading.Condition()  # protects the rest
        self._wanted = False
        self._busy = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def request(self) -> None:
        """Have the function called soon. Any thread; does not wait."""
        with self._changed:
            if self._closing:
                return
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float | None) -> bool:
        """Wait until nothing is wanted and nothing runs; False if that was not so in time."""
        if threading.current_thread() is self._thread:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not (self._wanted or self._busy), timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread; False if it did not end in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while self._wait():
            more = False
            try:
                more = self._function()
            except Exception:
                log.exception("the thread %s has failed", self._name)
            with self._changed:
                self._busy = False
                self._wanted = self._wanted or more
                self._changed.notify_all()

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._closing)
            if self._closing:
                self._wanted = False
                self._changed.notify_all()
                return False
            self._wanted, self._busy = False, True
            return True
