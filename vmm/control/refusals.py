"""Which exceptions of the layers below are answers, not bugs, and the text that a client gets for them."""

from __future__ import annotations

from vmm.errors import PageferryError

__all__ = ["refusal_text"]


def refusal_text(error: Exception) -> str | None:
    """The text for the client, or None if the error is unexpected.

    An OSError comes from an address, file or command that the client named: it loses Python's `[Errno 2]`.
    """
    if isinstance(error, PageferryError):
        return str(error)
    if isinstance(error, OSError):
        if error.strerror is None:
            return str(error)
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None
