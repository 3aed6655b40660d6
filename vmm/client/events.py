"""The events of the schema. Made by tools/client_generator.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from vmm.client.base import Event, Wire, stamp
from vmm.client.types import (
    DumpQueryResult,
    GuestPanicAction,
    GuestPanicInformation,
    MigrationStatus,
    PostcopyState,
    ShutdownCause,
)

__all__ = [
    "EVENTS",
    "DumpCompletedEvent",
    "GuestCrashloadedEvent",
    "GuestPanickedEvent",
    "MigrationEvent",
    "MigrationPassEvent",
    "PostcopyStateEvent",
    "PowerdownEvent",
    "ResetEvent",
    "ResumeEvent",
    "ShutdownEvent",
    "StopEvent",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpCompletedEvent(Event):
    """A dump has ended."""

    result: DumpQueryResult
    error: str | None = None
    """Why it failed."""

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            result=DumpQueryResult.from_wire(message["data"]["result"]),
            error=message["data"].get("error"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEvent(Event):
    """The state of the migration changed; with the capability events."""

    status: MigrationStatus

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            status=message["data"]["status"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPassEvent(Event):
    """A pass over RAM begins; with the capability events."""

    pass_: int
    """Its number, from 1."""

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            pass_=message["data"]["pass"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyStateEvent(Event):
    """At the destination: the postcopy state changed."""

    state: PostcopyState

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            state=message["data"]["state"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEvent(Event):
    """The guest's CPU was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeEvent(Event):
    """The guest's CPU runs again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownEvent(Event):
    """The machine shuts down. With -no-shutdown the process lives on and is to be ended with quit."""

    guest: bool
    """Whether the guest asked for it."""
    reason: ShutdownCause

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            guest=message["data"]["guest"],
            reason=message["data"]["reason"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetEvent(Event):
    """The machine is reset."""

    guest: bool
    """Whether the guest asked for it."""
    reason: ShutdownCause

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            guest=message["data"]["guest"],
            reason=message["data"]["reason"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerdownEvent(Event):
    """The power button was pressed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPanickedEvent(Event):
    """The guest reported a panic, or did what no CPU survives."""

    action: GuestPanicAction
    info: GuestPanicInformation | None = None

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            action=message["data"]["action"],
            info=None
            if (got := message["data"].get("info")) is None
            else GuestPanicInformation.from_wire(got),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestCrashloadedEvent(Event):
    """The guest has panicked and goes on with its crash kernel."""

    action: GuestPanicAction
    info: GuestPanicInformation | None = None

    @classmethod
    def from_wire(cls, message: Wire) -> Self:
        """Of a server's message."""
        return cls(
            **stamp(message),
            action=message["data"]["action"],
            info=None
            if (got := message["data"].get("info")) is None
            else GuestPanicInformation.from_wire(got),
        )


EVENTS: Final[dict[str, type[Event]]] = {
    "DUMP_COMPLETED": DumpCompletedEvent,
    "MIGRATION": MigrationEvent,
    "MIGRATION_PASS": MigrationPassEvent,
    "POSTCOPY_STATE": PostcopyStateEvent,
    "STOP": StopEvent,
    "RESUME": ResumeEvent,
    "SHUTDOWN": ShutdownEvent,
    "RESET": ResetEvent,
    "POWERDOWN": PowerdownEvent,
    "GUEST_PANICKED": GuestPanickedEvent,
    "GUEST_CRASHLOADED": GuestCrashloadedEvent,
}
"""By the names on the wire."""
