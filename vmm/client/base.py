"""What the generated files stand on: objects on the wire, arguments that are left out, any event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

__all__ = ["NOT_GIVEN", "Event", "NotGiven", "UnknownEvent", "Wire", "given", "stamp"]

Wire = dict[str, Any]
"""A JSON object as it is on the wire."""


class NotGiven:
    """The type of NOT_GIVEN."""


NOT_GIVEN: Final = NotGiven()
"""An argument that is left out; None is JSON's null."""


def given(**members: Any) -> Wire:
    """The members that are given, by the names that they have on the wire."""
    return {
        name.rstrip("_").replace("_", "-"): value for name, value in members.items() if value is not NOT_GIVEN
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Any event: its name and its time, in seconds since the epoch."""

    name: str
    timestamp_s: float

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(**stamp(message))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownEvent(Event):
    """An event that the schema did not have when these files were made."""

    data: Wire

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(**stamp(message), data=message.get("data", {}))


def stamp(message: Wire) -> Wire:
    """The members of `Event` in a server's message."""
    time = message["timestamp"]
    return {"name": message["event"], "timestamp_s": time["seconds"] + time["microseconds"] / 1_000_000}
