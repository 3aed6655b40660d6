"""What a device that prints knows of the world outside."""

from __future__ import annotations

from typing import Protocol

__all__ = ["CharSink", "NullSink"]


class CharSink(Protocol):
    """The backend's side as the UART sees it."""

    def write_nowait(self, data: bytes) -> int:
        """Take as many bytes as there is room for and give their number; never waits."""

    def accept_input(self) -> None:
        """The UART has room again: input that was held back may come. Never waits."""

    def wait_flushed(self, timeout_s: float, /) -> bool:
        """Wait until the outside has what was taken; False if it has not in that time."""


class NullSink:
    """A backend that swallows everything."""

    def write_nowait(self, data: bytes) -> int:
        return len(data)

    def accept_input(self) -> None:
        return None

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return True
