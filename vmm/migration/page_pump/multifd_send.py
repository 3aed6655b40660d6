"""multifd at the source: packets of dirty pages over several connections, each with a thread of its own.

mig/source      collects pages into the packet of an idle channel; zeroes go into the main stream
mig/multifd N   compresses and writes the packet (in C, or by one call without the GIL), and is idle again
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from typing import TYPE_CHECKING

from vmm.migration.byte_stream import StreamWriter
from vmm.migration.compression import compressor
from vmm.migration.multifd_wire import MAX_PAGES, METHODS, SYNC, PacketHead, hello
from vmm.migration.page_pump.failure import raise_for_pump
from vmm.migration.page_pump.native import check, ffi, lib
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.migration.page_pump.blocks import PumpBlocks
    from vmm.ram import RAMBlock

__all__ = ["MultifdSender"]


class _Channel:
    """One connection; `packet` belongs to mig/source while it is idle."""

    def __init__(self, writer: StreamWriter, number: int, method: str, level: int) -> None:
        self.packet = ffi.new("struct pp_packet *")
        self.flags = 0
        self.error: BaseException | None = None
        self.writer = writer
        self._method = METHODS[method]
        self._compress = None if method == "none" else compressor(method, level)
        self._buffer = ffi.new("uint8_t[]", MAX_PAGES * PAGE_SIZE_BYTES) if self._compress else None
        self._packets = 0
        self._jobs: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"mig/multifd {number}")

    def start(self, blocks: PumpBlocks, idle: queue.SimpleQueue[_Channel]) -> None:
        self._blocks, self._idle = blocks, idle
        self._thread.start()

    def submit(self) -> None:
        """The packet, or SYNC, goes out; the channel is idle when it has."""
        self._jobs.put(True)

    def end(self) -> None:
        self._jobs.put(False)
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        while self._jobs.get():
            try:
                if self.error is None:
                    self._write()
            except BaseException as error:
                self.error = error
            self._idle.put(self)

    def _write(self) -> None:
        packet, count, index = self.packet, self.packet.count, self.packet.block
        block = self._blocks.array + index
        flags, data, size = self.flags, b"", count * PAGE_SIZE_BYTES
        if count:
            flags |= self._method
        if count and self._compress is not None:
            lib.pp_multifd_gather(block, packet, self._buffer)
            data = self._compress(bytes(ffi.buffer(self._buffer, size)))
            size = len(data)
        offsets = struct.pack(f">{count}Q", *(page * PAGE_SIZE_BYTES for page in packet.pages[0:count]))
        name = self._blocks.names[index] if count else ""
        head = PacketHead(flags, count, size, self._packets, name).encode(offsets)
        self._packets += 1
        if data or not count:
            self.writer.write(head + data)
            self.writer.flush()
        else:
            result = lib.pp_multifd_write(self.writer.struct, block, packet, head, len(head))
            check(result, "Unable to write to a multifd channel")
        packet.count = self.flags = 0


class MultifdSender(PageSender):
    """Sends dirty pages of `blocks` into `writer` (zeroes) and `fds` (all others)."""

    def __init__(
        self,
        blocks: Sequence[RAMBlock],
        writer: StreamWriter,
        fds: Sequence[int],
        cancel_fd: int,
        *,
        method: str,
        level: int,
        uuid: bytes | None,
    ) -> None:
        super().__init__(blocks, writer)
        self._idle: queue.SimpleQueue[_Channel] = queue.SimpleQueue()
        self._channels = [
            _Channel(StreamWriter(fd, cancel_fd), number, method, level) for number, fd in enumerate(fds)
        ]
        for number, channel in enumerate(self._channels):
            channel.writer.write(hello(uuid, number))
            channel.writer.flush()
        for channel in self._channels:
            channel.start(self.blocks, self._idle)
            self._idle.put(channel)

    @property
    def channel_bytes(self) -> int:
        """Bytes that went over other channels than the writer's."""
        return sum(channel.writer.total_bytes for channel in self._channels)

    def _take_idle(self) -> _Channel:
        """Wait for one. What ends a wait for the peer, a cancel too, makes its channel idle."""
        channel = self._idle.get()
        if channel.error is not None:
            self._idle.put(channel)
            raise channel.error
        return channel

    def _take_all(self) -> list[_Channel]:
        return [self._take_idle() for _ in self._channels]

    def send(
        self, max_pages: int, *, batch: int = 0, requests_only: bool = False, until_s: float = 0.0
    ) -> int:
        """As `PageSender.send`; raises what a channel has failed with, too."""
        del batch
        assert not requests_only, "there is no postcopy with multifd"
        sent = 0
        while sent < max_pages and not (until_s and sent and time.monotonic() >= until_s):
            channel = self._take_idle()
            taken = lib.pp_multifd_collect(self.struct, channel.packet, max_pages - sent)
            if taken > 0 and channel.packet.count:
                channel.submit()
            else:
                self._idle.put(channel)
            raise_for_pump(int(taken), self.struct.fault, "Unable to write to the channel", self.blocks.names)
            if not taken:
                break
            sent += int(taken)
        return sent

    def end_of_section(self) -> None:
        """SYNC over every channel, behind all pages; written when this returns. Raises as `send`."""
        for channel in self._take_all():
            channel.flags = SYNC
            channel.submit()
        for channel in self._take_all():
            self._idle.put(channel)

    def end(self) -> None:
        """Join the threads; the channels were shut down, or have nothing more to write."""
        for channel in self._channels:
            channel.end()
