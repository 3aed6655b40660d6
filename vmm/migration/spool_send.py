"""Sends a spool to the destination that waits for it: the source's side of a recovery, without a machine.

    spool - connect - what became of the guest? - RECV_BITMAP, RESUME - the pages - END - SHUT

A page that the destination lacks and the spool does not have ends it before a page is sent: nothing is
invented. Source: as `source_recovery.py`.
"""

from __future__ import annotations

import logging
import mmap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmm.migration import channel as channels
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import MigrationError
from vmm.migration.page_pump.native import ffi
from vmm.migration.peer import Fate
from vmm.migration.source_recovery import agree_on_resume, ask_fate
from vmm.migration.source_return import ReturnPathThread
from vmm.migration.source_stream import POSTCOPY_BATCH_PAGES, SourceStream
from vmm.migration.spool import read_spool
from vmm.migration.status import Role
from vmm.migration.uri import parse_uri
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.spool import Spool, SpoolBlock

__all__ = ["send_spool"]

log = logging.getLogger(__name__)

PART_PAGES = 4096


@dataclass(frozen=True)
class _FileBlock:
    """A RAMBlock in the spool, as the page pump wants one; `memory` keeps the address alive."""

    name: str
    page_count: int
    host_address: int
    memory: Any
    fd: int | None = None

    @property
    def length_bytes(self) -> int:
        return self.page_count * PAGE_SIZE_BYTES


def _map(spool: Spool, block: SpoolBlock) -> _FileBlock:
    with open(spool.path, "rb") as file:
        length = block.pages * PAGE_SIZE_BYTES
        mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=block.pages_at)
    memory = ffi.from_buffer(mapping)
    return _FileBlock(block.name, block.pages, int(ffi.cast("uintptr_t", memory)), memory)


def send_spool(path: str, uri: str, *, peer_timeout_ms: int = 0) -> int:
    """Complete the destination that listens at `uri` (migrate-recover) from the spool; how many pages went.

    Raises:
        SpoolError: `path` is no spool.
        MigrationError, StreamError, OSError: the destination is not there, is another one, or was lost again;
            the spool is as it was, and may be sent again.
    """
    spool = read_spool(path)
    cancel = CancelEvent()
    channel = channels.connect(parse_uri(uri, Role.SOURCE), _no_fd, cancel.fd, peer_timeout_ms)
    try:
        if not channel.two_way:
            raise MigrationError(f"A spool needs a two-way transport, and {channel.name} is one-way")
        return _send(spool, channel, cancel)
    finally:
        channel.close()


def _no_fd(name: str) -> int:
    raise MigrationError(f"There is no descriptor '{name}' here")


def _send(spool: Spool, channel: channels.Channel, cancel: CancelEvent) -> int:
    blocks: Any = [_map(spool, block) for block in spool.blocks]
    stream = SourceStream(blocks, StreamWriter(channel.write_fd, cancel.fd))
    return_cancel = CancelEvent()
    reader = StreamReader(channel.read_fd, return_cancel.fd)
    return_path = ReturnPathThread(stream.sender, reader, on_error=channel.shutdown)
    return_path.start()
    try:
        fate = ask_fate(spool.migration, stream, return_path, cancel.fd)
        if fate is Fate.COMPLETE:
            return 0
        if fate is not Fate.STARTED:
            raise MigrationError(f"The destination says of this guest: {fate.name.lower().replace('_', ' ')}")
        if spool.migration is not None:  # else a stock QEMU may wait, and would die of it
            stream.checksum_pages()  # whether the dead source sent them or not
        agree_on_resume(stream, return_path, cancel.fd)
        _check_all_there(spool, stream.sender)
        sent = _send_pages(stream, return_path)
        return_path.wait_shut(cancel.fd)
        return sent
    finally:
        return_cancel.set()
        return_path.join()


def _check_all_there(spool: Spool, sender: PageSender) -> None:
    """Raises MigrationError: the destination lacks a page that was not owed when the spool was made."""
    for block in spool.blocks:
        owed = spool.owed(block)
        sender.populated[block.name].or_(owed)
        absent = sender.dirty[block.name].copy()
        absent.andnot(owed)
        if absent.count():
            raise MigrationError(
                f"{spool.path}: the destination lacks {absent.count()} pages of RAMBlock '{block.name}' that "
                f"the spool does not have, the first is page {absent.find_next_set(0)}"
            )


def _send_pages(stream: SourceStream, return_path: ReturnPathThread) -> int:
    sent, began_s = stream.sender.dirty_count(), time.monotonic()
    while stream.sender.dirty_count():
        return_path.check()
        stream.part(lambda sender: _send_part(sender))
    stream.last_pages()
    stream.eof(None)
    log.info("%d pages were sent from the spool in %.1f s", sent, time.monotonic() - began_s)
    return sent


def _send_part(sender: PageSender) -> None:
    sender.send(PART_PAGES, batch=POSTCOPY_BATCH_PAGES)
