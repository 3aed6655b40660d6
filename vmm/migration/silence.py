"""Notices a peer that says nothing: stopped, or behind a link that swallows everything.

    SOURCE  --- stream: a section each 100 ms at most, PING alive where there is none --->  DESTINATION
            <-- return path: PONG alive, four times a second ----------------------------
    either side: nothing came for x-peer-timeout -> the channel is shut down, which is a cut like any other

Only between two Pageferries, which know each other by the hello (`peer.py`): stock QEMU says nothing while it
has nothing to say, once it has answered the first PING. Time during which this process itself was stopped
does not count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["BEAT_S", "SilenceWatch"]

BEAT_S = 0.25
"""Between two signs of life; the shortest x-peer-timeout is four of them."""


class SilenceWatch:
    """One thread, mig/watch, for one channel."""

    def __init__(
        self,
        heard: Callable[[], int | None],
        limit_ms: Callable[[], int],
        on_silent: Callable[[str], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`heard` counts what has come, None while nothing is expected; `on_silent` is told each time."""
        self._heard = heard
        self._limit_ms = limit_ms
        self._on_silent = on_silent
        self._beat = beat
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._main, name="mig/watch")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; harmless when it never began. Not to be called by what it calls."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
        # Whoever is watched owns the watch: without this both would wait for Python's search for cycles.
        self._heard, self._on_silent, self._beat = (lambda: None), (lambda _text: None), (lambda: None)

    def _main(self) -> None:
        last, silent_s, before_s = self._heard(), 0.0, time.monotonic()
        while not self._end.wait(BEAT_S):
            self._beat()
            heard, now_s = self._heard(), time.monotonic()
            if heard is None or heard != last:
                last, silent_s = heard, 0.0
            else:
                # A longer pause than two beats is our own: we were stopped, or had no processor.
                silent_s += min(now_s - before_s, 2 * BEAT_S)
            before_s = now_s
            limit_ms = self._limit_ms()
            if limit_ms and silent_s * 1000 >= limit_ms:
                self._on_silent(f"nothing was heard from it for {int(silent_s * 1000)} ms (x-peer-timeout)")
                last, silent_s = None, 0.0
