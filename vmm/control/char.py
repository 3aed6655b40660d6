"""Handlers of schema/char.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qmp.dispatcher import Handler

__all__ = ["handlers"]


def handlers(chardevs: Callable[[], list[dict[str, Any]]]) -> dict[str, Handler]:
    """Command name -> handler; `chardevs` gives ChardevInfo objects."""
    return {"query-chardev": lambda call: chardevs()}
