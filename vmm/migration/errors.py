"""The exceptions of the migration stack, in one tree under that of `vmm.errors`.

    PageferryError
     +- StreamError                    (vmm.errors) bytes that are not a migration stream
     |   +- StreamTruncated            (vmm.errors) the bytes ended in the middle of something
     |   |   +- RecordTruncated        the same, and it is known of what
     |   +- WireError                  what, offset, expected, got: the peer wrote something else
     |       +- NotAMigrationStream    not even the header is one
     |       +- PageDamaged            a page is not what the source sent, by its checksum
     |       +- IllegalRecord          a record, page record or message that does not fit its layout
     |       +- LimitExceeded          a length over the limit that the reader was given
     |       +- StreamMismatch         a well-formed stream for another machine, RAM layout or version
     +- MigrationError                 (vmm.errors) a migration cannot start or go on
         +- MigrationRefused           a command that is not possible now; nothing has changed
         |   +- ParameterRefused       a value out of range: whose, and what is accepted
         +- IllegalStatusMove          our own bug: a move the table of status.py does not have
         +- IllegalPageMove            our own bug: a move between page states that pages.py forbids
         +- PeerError                  the other side did something wrong, or says that it failed
         |   +- PeerClosed             it closed the connection where more was owed
         |   +- PeerSilent             it gave no sign of life for x-peer-timeout
         |   +- PeerReported           it said through the return path that it failed
         |   +- WrongPostcopyState     a command that the present postcopy state does not allow
         |   +- BadPageRequest         it asks for pages that there are not
         +- LostPages                  the end of the stream, but pages are missing
         +- Cancelled                  the user cancelled; the guest stays at the source
         +- DidNotStart                the destination says so of a guest that was handed to it
         +- TakenBack                  the user says that the destination is gone for good
         +- HandOverUncertain          nobody can know which side owns the guest; a user decides

The class says whose fault it is. Attributes carry what a program needs, so that nobody reads the text.
After an error from a stream that stream is dead; the only way back is recovery.py.
"""

from __future__ import annotations

from vmm.errors import MigrationError, StreamError, StreamTruncated

__all__ = [
    "BadPageRequest",
    "Cancelled",
    "DidNotStart",
    "HandOverUncertain",
    "IllegalPageMove",
    "IllegalRecord",
    "IllegalStatusMove",
    "LimitExceeded",
    "LostPages",
    "MigrationError",
    "MigrationRefused",
    "NotAMigrationStream",
    "PageDamaged",
    "ParameterRefused",
    "PeerClosed",
    "PeerError",
    "PeerReported",
    "PeerSilent",
    "RecordTruncated",
    "StreamError",
    "StreamMismatch",
    "StreamTruncated",
    "TakenBack",
    "WireError",
    "WrongPostcopyState",
    "reason",
]


def reason(error: BaseException) -> str:
    """The text of an error for a user: an OSError's without its number in front."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class WireError(StreamError):
    """The peer wrote something else than the format has at this place.

    `what` names the record and field, `offset` is the byte offset in the stream (None when we were encoding),
    `expected` and `got` say what the format wants and what was there.
    """

    def __init__(
        self, what: str, *, offset: int | None = None, expected: object = None, got: object = None
    ) -> None:
        wanted = "" if expected is None else f": expected {expected}"
        seen = "" if got is None else f", got {got}" if wanted else f": {got}"
        super().__init__(f"{what}{wanted}{seen}", offset=offset)
        self.what = what
        self.expected = expected
        self.got = got


class RecordTruncated(StreamTruncated):
    """The bytes ended in the middle of `what`: `wanted` bytes were needed at `offset`, `got` were there."""

    def __init__(self, what: str, wanted: int, got: int, *, offset: int | None = None) -> None:
        super().__init__(wanted, got, offset=offset)
        self.what = what

    def __str__(self) -> str:
        return f"{super().__str__()}, in {self.what}"


class NotAMigrationStream(WireError):
    """Not even the header is that of a migration stream: a stranger connected, or the wrong file."""


class IllegalRecord(WireError):
    """A record, page record or return path message that does not fit its layout."""


class PageDamaged(WireError):
    """A page is not what the source sent: its checksum says so. It was not placed.

    `page_offset` is that in the RAMBlock `block`, in bytes; `offset` is where the record began in the stream.
    """

    def __init__(
        self, block: str, page_offset: int, expected: int, got: int, *, offset: int | None = None
    ) -> None:
        what = f"Checksum of the page at {page_offset:#x} of RAMBlock '{block}'"
        super().__init__(what, offset=offset, expected=f"{expected:#018x}", got=f"{got:#018x}")
        self.block = block
        self.page_offset = page_offset


class LimitExceeded(WireError):
    """A length or count over the limit that the reader was given."""


class StreamMismatch(WireError):
    """A well-formed stream that this machine cannot take: another machine, RAM layout or version."""


class MigrationRefused(MigrationError):
    """A command that is not possible now; the text is QEMU's own, and nothing has changed."""


class ParameterRefused(MigrationRefused):
    """A capability or parameter value that is not accepted; `name` says which one, nothing was set."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class IllegalStatusMove(MigrationError):
    """A MigrationStatus move that the table does not have; the status is unchanged."""

    def __init__(self, role: str, current: str, wanted: str) -> None:
        super().__init__(f"Illegal migration status move at the {role}: '{current}' -> '{wanted}'")
        self.role = role
        self.current = current
        self.wanted = wanted


class IllegalPageMove(MigrationError):
    """A page state move that the three-state model does not have; the maps are unchanged."""

    def __init__(self, block: str, page: int, current: str, wanted: str) -> None:
        super().__init__(f"Illegal move of page {page} of RAMBlock '{block}': {current} -> {wanted}")
        self.block = block
        self.page = page
        self.current = current
        self.wanted = wanted


class PeerError(MigrationError):
    """The other side broke the protocol, or says that it failed."""


class PeerClosed(PeerError):
    """The peer closed the connection although it still owed us something."""


class PeerSilent(PeerError):
    """The peer gave no sign of life for longer than x-peer-timeout allows."""


class PeerReported(PeerError):
    """The peer said through the return path that it failed; `value` is what it sent with SHUT."""

    def __init__(self, value: int) -> None:
        super().__init__(f"Sibling indicated error {value}")
        self.value = value


class WrongPostcopyState(PeerError):
    """The peer sent a postcopy command that the present state does not allow; the state is unchanged."""

    def __init__(self, command: str, state: str) -> None:
        super().__init__(f"{command} in wrong postcopy state ({state})")
        self.command = command
        self.state = state


class BadPageRequest(PeerError):
    """The destination asks for pages that there are not, or that are not whole pages."""

    def __init__(self, block: str, start: int, length: int, reason: str) -> None:
        super().__init__(f"Bad page request for RAMBlock '{block}', {length} bytes at {start:#x}: {reason}")
        self.block = block
        self.start = start
        self.length = length
        self.reason = reason


class LostPages(MigrationError):
    """The source says that all was sent, but `missing` pages have not been received.

    Their RAM must stay registered: unregistering would turn them into silent zero pages.
    """

    def __init__(self, missing: dict[str, int]) -> None:
        counts = ", ".join(f"{count} of RAMBlock '{name}'" for name, count in missing.items() if count)
        super().__init__(f"The migration ended but pages are missing: {counts}")
        self.missing = missing


class Cancelled(MigrationError):
    """The user cancelled the migration; the guest stays at the source."""

    def __init__(self, text: str = "The migration was cancelled") -> None:
        super().__init__(text)


class DidNotStart(MigrationError):
    """The destination says that it did not start the guest, and never will: it is the source's again."""

    def __init__(self) -> None:
        super().__init__("The destination did not start the guest, so it stays here")


class TakenBack(MigrationError):
    """The user says that the destination is gone for good."""

    def __init__(self) -> None:
        super().__init__("Taken back: what the guest did at the destination is lost. 'cont' runs it here")


class HandOverUncertain(MigrationError):
    """The connection failed after the hand-over, so the destination may or may not have started the guest.

    The source stays paused until the destination has said that it did not start, or a user decides.
    """
