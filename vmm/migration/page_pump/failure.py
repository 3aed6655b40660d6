"""What the page pump found wrong with the peer's bytes, as the migration's own errors."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from vmm.errors import MigrationError, StreamError, StreamTruncated
from vmm.migration.errors import BadPageRequest, IllegalRecord, PageDamaged, StreamMismatch
from vmm.migration.page_pump.native import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["raise_for_pump"]


def raise_for_pump(result: int, fault: Any, what: str, blocks: Sequence[str]) -> None:
    """Turn a negative result of the page pump into an exception that says what, where, expected and got.

    Raises:
        StreamError: the peer's bytes were wrong (`fault` says how) or ended.
        MigrationError: a page is present or absent where it must not be.
        Cancelled, OSError: see `native.check`.
    """
    if result == -errno.ENODATA:
        raise StreamTruncated(1, 0, offset=None)
    if result == -errno.EPROTO:
        raise _stream_error(fault, blocks)
    if result in (-errno.EEXIST, -errno.EFAULT) and fault.bad:
        raise _page_error(fault)
    check(result, what)


def _text(fault: Any) -> str:
    return bytes(ffi.string(fault.name)).decode("utf-8", "backslashreplace")


def _stream_error(fault: Any, blocks: Sequence[str]) -> StreamError | MigrationError:
    value, offset = int(fault.value), int(fault.offset)
    known = ", ".join(blocks)
    rows: dict[int, tuple[str, str, object]] = {
        lib.PP_BAD_FLAGS: ("page record flags", "PAGE, ZERO or EOS", hex(value)),
        lib.PP_BAD_NO_BLOCK: ("page record", "a RAMBlock name", "CONTINUE"),
        lib.PP_BAD_OFFSET: ("Illegal RAM offset", "a page aligned offset inside the RAMBlock", hex(value)),
        lib.PP_BAD_RECORD: ("record type", "a record that may follow here", hex(value)),
        lib.PP_BAD_SECTION: ("section id", "that of the ram section", value),
        lib.PP_BAD_FOOTER: ("Missing section footer for ram: section id", "that of the ram section", value),
        lib.PP_BAD_LENGTH: ("length", "that of this record", value),
        lib.PP_BAD_ENCODING: ("XBZRLE page", "an encoding that stays inside the page", f"page {value:#x}"),
        lib.PP_BAD_NO_PAGE: ("XBZRLE page", "the page itself before its difference", f"page {value:#x}"),
        lib.PP_BAD_FILL: ("fill byte of a zero page in postcopy", "0", value),
        lib.PP_BAD_MESSAGE: ("return path message type", "a known one", value),
    }
    if fault.bad == lib.PP_BAD_BLOCK:
        return StreamMismatch("Unknown RAMBlock", offset=offset, expected=f"one of {known}", got=_text(fault))
    if fault.bad == lib.PP_BAD_CHECKSUM:
        return PageDamaged(_text(fault), value, int(fault.expected), int(fault.got), offset=offset)
    what, expected, got = rows[int(fault.bad)]
    return IllegalRecord(what, offset=offset, expected=expected, got=got)


def _page_error(fault: Any) -> MigrationError:
    value = int(fault.value)
    if fault.bad == lib.PP_BAD_PRESENT:
        return MigrationError(f"The page at offset {value:#x} is present although it was never received")
    if fault.bad == lib.PP_BAD_LOST:
        return MigrationError(f"The page at offset {value:#x} was received and is gone; it stays missing")
    if fault.bad == lib.PP_BAD_FAULT:
        return MigrationError(f"userfaultfd reported a fault at {value:#x}, outside every RAMBlock")
    return BadPageRequest(_text(fault), value, 0, "outside the RAMBlock")
