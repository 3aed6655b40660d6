"""Recovery at the source: what is said on the new channel of a paused migration, before pages are sent again.

    X_ASK name                     X_FATE: started -> go on; complete, not started -> nothing to go on with
    RECV_BITMAP, for each block    its received map: what is not in it is dirty, and nothing else
    RESUME                         RESUME_ACK

The first row only between two Pageferries. Source: QEMU 7.2 migration/migration.c (postcopy_do_resume,
ram_resume_prepare), migration/ram.c (ram_dirty_bitmap_reload, ram_state_resume_prepare).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmm.migration.bitmap import Bitmap
from vmm.migration.peer import Fate
from vmm.migration.return_path import FateReply, ResumeAck

if TYPE_CHECKING:
    from vmm.migration.source_return import ReturnPathThread
    from vmm.migration.source_stream import SourceStream

__all__ = ["agree_on_resume", "ask_fate"]

log = logging.getLogger(__name__)


def ask_fate(
    migration: bytes | None, stream: SourceStream, return_path: ReturnPathThread, cancel_fd: int
) -> Fate:
    """What became of the guest. A stock destination cannot be asked: it is there, so it has started it.

    Raises:
        PeerError, StreamError, OSError: the channel broke, or the destination said something else.
        Cancelled: `cancel_fd` became readable.
    """
    if migration is None:
        return Fate.STARTED
    return_path.expect(FateReply)
    stream.ask(migration)
    fate = return_path.wait_fate(cancel_fd)
    log.info("the destination says of the guest: %s", fate.name)
    return fate


def agree_on_resume(stream: SourceStream, return_path: ReturnPathThread, cancel_fd: int) -> None:
    """Make dirty what the destination has not received, and agree to go on. Raises as `ask_fate`.

    Pages that were on the wire when it broke are dirty again. A page that the destination has is not: the
    guest may have written to it since.
    """
    sender = stream.sender
    blocks = list(sender.dirty)
    return_path.expect(*blocks, ResumeAck)
    stream.ask_received(blocks)
    for name, raw in return_path.wait_bitmaps(blocks, cancel_fd).items():
        dirty = sender.dirty[name]
        dirty.fill(True)
        dirty.andnot(Bitmap.from_bytes(dirty.pages, raw))
    log.info("recovery: %d pages are still to be sent", sender.dirty_count())
    stream.resume()
    return_path.wait_resume_ack(cancel_fd)
