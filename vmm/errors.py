"""The exceptions of vmm/, in one tree.

    PageferryError                what every error of the project derives from; str() is for a user
     +- OptionError               the command line is wrong; the user can cure it
     +- MachineError              the machine cannot do what was asked, or cannot be built
     |   +- IllegalRunState       a move that the run state table does not have
     |   +- BootError             the boot image is bad or does not fit the machine
     |   +- DeviceError           a device was set up wrongly
     |   +- ChardevError          a character backend cannot be opened or has failed
     +- CpuError                  the CPU engine cannot be used, or has failed
     +- VMStateError              device state that does not fit its description
     +- StreamError               bytes that are not a migration stream of ours or of QEMU's
     |   +- StreamTruncated       the bytes ended in the middle of something
     +- MigrationError            a migration cannot start or go on

Packages below add their own classes to this tree in their own `errors.py`. The class says whose fault it
is; attributes carry what a program needs, so nobody reads the text.
"""

from __future__ import annotations

__all__ = [
    "BootError",
    "ChardevError",
    "CpuError",
    "DeviceError",
    "IllegalRunState",
    "MachineError",
    "MigrationError",
    "OptionError",
    "PageferryError",
    "StreamError",
    "StreamTruncated",
    "VMStateError",
]


class PageferryError(Exception):
    """An error with a text that can be shown to a user as it is."""


class OptionError(PageferryError):
    """A command line option is wrong: `option` is its name with the dash, if one is to blame."""

    def __init__(self, text: str, option: str | None = None) -> None:
        super().__init__(f"{option}: {text}" if option else text)
        self.option = option


class MachineError(PageferryError):
    """The machine cannot be built, or cannot do what was asked now."""


class IllegalRunState(MachineError):
    """A run state move that is not in the table; the run state is unchanged."""

    def __init__(self, current: str, wanted: str) -> None:
        super().__init__(f"Invalid run state transition: '{current}' -> '{wanted}'")
        self.current = current
        self.wanted = wanted


class BootError(MachineError):
    """The boot image is unreadable, malformed, or does not fit into guest RAM."""


class DeviceError(MachineError):
    """A device was given properties it cannot have."""


class ChardevError(MachineError):
    """A character backend cannot be opened, or a second user wants it."""


class CpuError(PageferryError):
    """The CPU engine is not the one expected, or failed while running.

    `expected` and `got` are filled in when a check of the engine failed.
    """

    def __init__(self, text: str, *, expected: object = None, got: object = None) -> None:
        super().__init__(text)
        self.expected = expected
        self.got = got


class VMStateError(PageferryError):
    """Device state that does not fit its description.

    `where` names section and field (`serial.lsr`), `offset` is the byte offset in the source (None when
    encoding), `expected` and `got` say what the table wants and what was there.
    """

    def __init__(
        self,
        what: str,
        where: str,
        *,
        offset: int | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        at = "" if offset is None else f" at offset {offset}"
        wanted = "" if expected is None else f", expected {expected}"
        seen = "" if got is None else f", got {got}"
        super().__init__(f"{what} in {where}{at}{wanted}{seen}")
        self.what = what
        self.where = where
        self.offset = offset
        self.expected = expected
        self.got = got


class StreamError(PageferryError):
    """Bytes that are not a migration stream; `offset` is where, counted from the stream's first byte."""

    def __init__(self, text: str, *, offset: int | None = None) -> None:
        super().__init__(text if offset is None else f"{text} (at offset {offset})")
        self.offset = offset


class StreamTruncated(StreamError):
    """The bytes ended although `wanted` more were needed; `got` of them were there."""

    def __init__(self, wanted: int, got: int, *, offset: int | None = None) -> None:
        super().__init__(f"Unexpected end of stream: {wanted} bytes wanted, {got} left", offset=offset)
        self.wanted = wanted
        self.got = got


class MigrationError(PageferryError):
    """A migration cannot start or cannot go on."""
