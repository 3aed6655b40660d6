"""The source's half of the page pump: which page goes next, and page requests into that order."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from vmm.migration.page_pump.blocks import SOURCE_MAPS, PumpBlocks
from vmm.migration.page_pump.failure import raise_for_pump
from vmm.migration.page_pump.native import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.migration.bitmap import Bitmap
    from vmm.migration.byte_stream import StreamReader, StreamWriter
    from vmm.ram import RAMBlock

__all__ = ["PageSender"]

RETURN_PATH_PAYLOAD_LIMIT = 512
"""QEMU 7.2 refuses longer ones (migration.c: source_return_path_thread)."""


class PageSender:
    """Sends dirty pages of `blocks` into `writer`.

    `send` is called by mig/source alone; `read_message` by mig/return alone; the request queue between them
    is guarded in C. The maps `dirty`, `sent` and `populated` belong to mig/source.
    """

    def __init__(self, blocks: Sequence[RAMBlock], writer: StreamWriter) -> None:
        self.blocks = PumpBlocks(blocks, SOURCE_MAPS)
        self._writer = writer
        self.struct = ffi.new("struct pp_source *")
        self.struct.blocks = self.blocks.array
        self.struct.block_count = len(blocks)
        self.struct.writer = writer.struct
        check(lib.pp_source_init(self.struct), "Cannot set up the page queue")
        self.close = weakref.finalize(self, lib.pp_source_free, self.struct)
        """Frees the queue, at the latest with the last reference. Nobody may be inside a call any more."""
        self._payload = ffi.new("uint8_t[]", RETURN_PATH_PAYLOAD_LIMIT)
        self._length = ffi.new("uint32_t *")
        self._last_block = ffi.new("int32_t *", -1)

    @property
    def dirty(self) -> Mapping[str, Bitmap]:
        """The dirty bitmap of each block: what is still to be sent."""
        return self.blocks.maps["dirty"]

    @property
    def sent(self) -> Mapping[str, Bitmap]:
        """The sent map of each block."""
        return self.blocks.maps["sent"]

    @property
    def populated(self) -> Mapping[str, Bitmap]:
        """Pages that may hold something else than zeros; a page outside is sent as zero without a look."""
        return self.blocks.maps["populated"]

    @property
    def urgent(self) -> Mapping[str, Bitmap]:
        """Pages that went over the second channel of postcopy-preempt, or are about to."""
        return self.blocks.maps["urgent"]

    @property
    def channel_bytes(self) -> int:
        """Bytes that went over other channels than the writer's."""
        return 0

    def end_of_section(self) -> None:
        """Everything that was sent is before the end of the section. Raises as `send`."""

    def dirty_count(self) -> int:
        """Pages still to be sent."""
        return self.blocks.count("dirty")

    def send(
        self,
        max_pages: int,
        *,
        batch: int = lib.PP_BATCH,
        requests_only: bool = False,
        until_s: float = 0.0,
    ) -> int:
        """Send up to `max_pages`, requested ones first, `batch` with content to a system call; how many.

        It ends when the monotonic clock shows `until_s` (0 = never), but not before the first system call.
        Fewer pages before that = no more are dirty.

        Raises:
            OSError, Cancelled: the channel failed, or the migration was cancelled while waiting for room.
        """
        result = lib.pp_source_send(
            self.struct, max_pages, min(batch, lib.PP_BATCH), int(requests_only), int(until_s * 1e9)
        )
        raise_for_pump(int(result), self.struct.fault, "Unable to write to the channel", self.blocks.names)
        return int(result)

    def discard(self, block: str, stale: Bitmap) -> int:
        """Write POSTCOPY_RAM_DISCARD commands for every page in `stale`; returns how many pages.

        Raises:
            OSError, Cancelled: as `send`.
        """
        index = self.blocks.index(block)
        result = lib.pp_source_discard(self.struct, index, ffi.cast("uint64_t *", stale.address))
        raise_for_pump(int(result), self.struct.fault, "Unable to write to the channel", self.blocks.names)
        return int(result)

    def checksum_pages(self) -> None:
        """From now on each page goes as a copy, with its checksum."""
        self._bounce = ffi.new("uint8_t[]", lib.PP_CHECKED_BATCH * lib.PP_PAGE_SIZE)
        self.struct.bounce = self._bounce

    @property
    def has_checksums(self) -> bool:
        """Do pages go with checksums?"""
        return bool(self.struct.bounce != ffi.NULL)

    def new_channel(self, writer: StreamWriter) -> None:
        """Go on over another channel: the next page record names its block, requests start afresh.

        mig/return of the old channel has ended.
        """
        self._writer = writer
        self.struct.writer = writer.struct
        self.struct.last_block = -1
        self._last_block[0] = -1
        self.struct.queue_used = 0
        for queued in self.blocks.maps["queued"].values():
            queued.fill(False)

    def read_message(self, reader: StreamReader) -> tuple[int, bytes]:
        """The next return path message that is not a page request; those go to the queue by themselves.

        Raises:
            StreamError: the message is malformed, asks for pages that there are not, or the stream ended.
            OSError, Cancelled: the channel failed, or the wait was cancelled.
        """
        result = lib.pp_source_read_message(
            self.struct, reader.struct, self._payload, self._length, self._last_block
        )
        raise_for_pump(
            int(result), self.struct.fault, "Unable to read from the return path", self.blocks.names
        )
        return int(result), bytes(ffi.buffer(self._payload, self._length[0]))

    def wake(self) -> None:
        """End the `wait_for_request` of mig/source, now or the next one. Any thread."""
        os.eventfd_write(self.struct.wake_fd, 1)

    def wait_for_request(self, cancel_fd: int, timeout_ms: int) -> bool:
        """Wait until pages have been requested or `wake` was called (True), or the time is over.

        Only in the body of a section, since meanwhile mig/return sends what is requested, if it can at once.

        Raises:
            Cancelled: `cancel_fd` became readable.
        """
        result = lib.pp_source_wait(self.struct, cancel_fd, timeout_ms)
        return bool(check(result, "Cannot wait for page requests"))
