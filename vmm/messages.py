"""How a line for the user begins, an error or one of the log: `-msg` says with what.

pageferry: text                                     plain
2026-01-31T12:00:00.123456Z guest pageferry: text   -msg timestamp=on,guest-name=on
"""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Heading"]


@dataclass
class Heading:
    """What is asked for; parsing the command line fills it in as far as it gets."""

    timestamp: bool = False
    guest_name: str | None = None
    """None: not shown."""

    def line(self, text: str, time_s: float | None = None) -> str:
        """`text` with its beginning; without a time it is said now."""
        shown = f"{self.guest_name} pageferry: {text}" if self.guest_name else f"pageferry: {text}"
        if not self.timestamp:
            return shown
        time_s = time.time() if time_s is None else time_s
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_s))
        return f"{stamp}.{int(time_s % 1 * 1e6):06d}Z {shown}"
