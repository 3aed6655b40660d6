"""Events on their way to every client: given a timestamp, checked against the schema, encoded once.

One thread, the loop's, calls the hub. Each client gets the events in the order they were emitted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from qmp.json_text import dump_json
from qmp.schema import Schema

__all__ = ["EventHub", "EventListener"]

_log = logging.getLogger(__name__)

EventListener = Callable[[dict[str, Any], bytes], None]
"""Takes the event as an object and as a line, CRLF included."""


class EventHub:
    """Where events are emitted and clients listen."""

    def __init__(
        self, schema: Schema, *, hide_unstable: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._schema = schema
        self._hide_unstable = hide_unstable
        self._clock = clock
        self._listeners: list[EventListener] = []
        self.emitted_count = 0
        """Events so far, whether or not somebody listened."""

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """Add a listener; the result takes it away again and may be called twice."""
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def now(self) -> float:
        """The time for an event that is emitted later, in seconds since the epoch."""
        return self._clock()

    def emit(self, name: str, data: dict[str, Any] | None = None, *, time_s: float | None = None) -> None:
        """Send an event to every listener; one unknown to the schema is logged and dropped."""
        known = self._schema.events.get(name)
        if known is None:
            _log.error("Event %s is not in the schema, dropped", name)
            return
        if self._hide_unstable and known.unstable:
            return
        stamp = self._clock() if time_s is None else time_s
        seconds = int(stamp)
        event: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": int((stamp - seconds) * 1_000_000)},
            "event": name,
        }
        if data:
            if self._hide_unstable and known.hide_unstable is not None:
                data = known.hide_unstable(data)
            event["data"] = data
        self.emitted_count += 1
        line = dump_json(event).encode("ascii") + b"\r\n"
        for listener in list(self._listeners):
            listener(event, line)
