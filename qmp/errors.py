"""What can go wrong with a QMP request, as the error object that the client sees.

    QmpError                the base: `error_class` and the text (`desc`) go on the wire
    +-- JsonSyntaxError     the bytes are not JSON, or exceed a limit; the reply carries no id
    +-- GenericError        anything else: malformed request, bad argument, refused command
    +-- CommandNotFound     no such command, or not at this stage of the negotiation
    +-- DeviceNotActive, DeviceNotFound, KVMMissingCap    kept by QEMU for old clients

The five classes are all that QEMU has ("ErrorClass" in its schema); the texts are those of QEMU 7.2.
"""

from __future__ import annotations

__all__ = [
    "CommandNotFound",
    "DeviceNotActive",
    "DeviceNotFound",
    "GenericError",
    "JsonSyntaxError",
    "KVMMissingCap",
    "QmpError",
]


class QmpError(Exception):
    """An error that is answered to the client; `str(error)` is the `desc` member."""

    error_class = "GenericError"


class GenericError(QmpError):
    """The client's request is malformed or was refused."""


class JsonSyntaxError(QmpError):
    """The input is not JSON; the reply cannot name the request it belongs to."""


class CommandNotFound(QmpError):
    """The command does not exist, or may not be used at this stage of the session."""

    error_class = "CommandNotFound"


class DeviceNotActive(QmpError):
    """The device is there but has not been activated."""

    error_class = "DeviceNotActive"


class DeviceNotFound(QmpError):
    """There is no device of that name."""

    error_class = "DeviceNotFound"


class KVMMissingCap(QmpError):
    """KVM lacks a capability that the command needs."""

    error_class = "KVMMissingCap"
