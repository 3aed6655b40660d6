"""A value that changes, and the browsers that watch it: server-sent events, the latest value, no backlog.

Whoever is slow misses values in between; what waits for one browser is one value and what the socket holds.
Source: the WHATWG HTML standard, "Server-sent events".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Feed"]


class Feed:
    """One value, as text without line breaks. Used on the loop's thread alone."""

    def __init__(self, refresh: Callable[[], None] = lambda: None) -> None:
        """`refresh` is called when somebody begins to watch, and may publish."""
        self._refresh = refresh
        self._latest = b""
        self._number = 0
        self._changed = asyncio.Event()
        self.watcher_count = 0
        """How many connections watch."""

    def begin(self) -> None:
        """One watcher more."""
        self.watcher_count += 1
        self._refresh()

    def end(self) -> None:
        """One watcher less."""
        self.watcher_count -= 1

    def publish(self, text: bytes) -> None:
        """Show this from now on.

        Raises:
            ValueError: it has a line break, which would end the event.
        """
        if b"\n" in text or b"\r" in text:
            raise ValueError("an event is one line")
        self._latest = text
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def next_event(self, seen: int) -> tuple[int, bytes]:
        """Wait for a value later than number `seen` (0: any); its number, and it as an event."""
        while self._number <= seen:
            await self._changed.wait()
        return self._number, b"data: " + self._latest + b"\n\n"
