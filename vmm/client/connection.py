"""One connection of the typed client: its commands, and its events as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Self

from qmp.client import EventStream, QmpClient
from vmm.client.base import Event, UnknownEvent, Wire
from vmm.client.commands import Commands
from vmm.client.events import EVENTS

__all__ = ["Client", "Events", "event_from_wire"]


def event_from_wire(message: Wire) -> Event:
    """The event in a message of the server."""
    return EVENTS.get(message["event"], UnknownEvent).from_wire(message)


class Events:
    """Events as they come, until the connection ends. Iterate over it."""

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return event_from_wire(await anext(self._stream))

    def close(self) -> None:
        """No more events are kept."""
        self._stream.close()


class Client(Commands):
    """One connection. `qmp` is the client below, for what has no method here."""

    @classmethod
    async def connect(cls, address: str | tuple[str, int], *, oob: bool = True) -> Self:
        """Connect to a unix socket's path or a TCP address, and negotiate."""
        return cls(await QmpClient.connect(address, oob=oob))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.qmp.close()

    def events(self) -> Events:
        """Events from now on."""
        return Events(self.qmp.events())
