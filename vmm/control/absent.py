"""Commands for devices that no machine here has: refused by name, so that a client knows why."""

from __future__ import annotations

from typing import NoReturn

from qmp.dispatcher import Call, Handler
from qmp.errors import DeviceNotActive, GenericError

__all__ = ["handlers", "no_balloon", "no_keyboard"]


def no_balloon() -> NoReturn:
    """Raises DeviceNotActive with QEMU's text."""
    raise DeviceNotActive("No balloon device has been activated")


def no_keyboard() -> NoReturn:
    """Raises GenericError. QEMU takes the keys of a machine without a keyboard, and drops them."""
    raise GenericError("This machine has no keyboard")


def handlers() -> dict[str, Handler]:
    """Command name -> handler."""

    def balloon(call: Call) -> NoReturn:
        no_balloon()

    def send_key(call: Call) -> NoReturn:
        no_keyboard()

    return {"balloon": balloon, "query-balloon": balloon, "send-key": send_key}
