"""multifd at the destination: pages come over several connections, each with a thread of its own.

A thread places pages as they come, and stops at SYNC until mig/load has come to the EOS of the same section
and all others to their SYNC. Each notes what it has received in a map of its own; mig/load adds it up there.
"""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING

from vmm.errors import StreamTruncated
from vmm.migration.bitmap import Bitmap
from vmm.migration.byte_stream import StreamReader
from vmm.migration.compression import decompressor
from vmm.migration.errors import Cancelled, IllegalRecord, PeerClosed, StreamMismatch
from vmm.migration.multifd_wire import HEAD_BYTES, HELLO, METHODS, PACKET, SYNC, PacketHead, read_hello
from vmm.migration.page_pump.native import check, ffi, lib
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.migration.page_pump.receiver import PageReceiver

__all__ = ["MultifdReceiver"]

log = logging.getLogger(__name__)


class _Channel:
    """One connection and its thread."""

    def __init__(self, owner: MultifdReceiver, reader: StreamReader, index: int) -> None:
        self._owner = owner
        self._reader = reader
        self._packet = ffi.new("struct pp_packet *")
        self._bad = ffi.new("uint64_t *")
        self._decompress = None if owner.method == "none" else decompressor(owner.method)
        self.synced = threading.Semaphore(0)
        self.may_go_on = threading.Semaphore(0)
        self.received: dict[str, Bitmap] = {}
        self.pages = 0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._main, name=f"mig/multifd {index}")

    def _main(self) -> None:
        try:
            self._owner.introduce(
                read_hello(self._reader.read(HELLO.size), self._owner.uuid, self._owner.count)
            )
            while self._reader.peek(1):
                self._take()
            # As stock does when it has sent everything; whether that was all, the next SYNC or EOF says.
            self.error = PeerClosed("The source has closed a multifd channel")
            self.synced.release()
        except BaseException as error:
            self.error = error
            self.synced.release()
            self._owner.failed(error)

    def _take(self) -> None:
        at = self._reader.offset
        data = self._reader.read(HEAD_BYTES)
        head = PacketHead.decode(data[: PACKET.size], METHODS[self._owner.method], at)
        if head.pages:
            self._place(head, data[PACKET.size :], at)
        if head.flags & SYNC:
            self.synced.release()
            self.may_go_on.acquire()
            if self._owner.is_closed:
                raise Cancelled()

    def _place(self, head: PacketHead, offsets: bytes, at: int) -> None:
        receiver = self._owner.receiver
        names = receiver.blocks.names
        if head.block not in names:
            expected = f"one of {', '.join(names)}"
            raise StreamMismatch("Unknown RAMBlock", offset=at + 64, expected=expected, got=head.block)
        block = receiver.blocks.array + names.index(head.block)
        if lib.pp_multifd_offsets(offsets, head.pages, block.pages, self._packet, self._bad) < 0:
            expected = f"pages of RAMBlock '{head.block}'"
            raise IllegalRecord(
                "multifd offset", offset=at + PACKET.size, expected=expected, got=hex(self._bad[0])
            )
        received = ffi.cast("uint64_t *", self.received[head.block].address)
        if self._decompress is None:
            result = lib.pp_multifd_read(self._reader.struct, block, self._packet, received)
            if result == -errno.ENODATA:
                raise StreamTruncated(head.size, 0, offset=self._reader.offset)
            check(result, "Unable to read from a multifd channel")
        else:
            pages = self._decompress(self._reader.read(head.size), head.pages * PAGE_SIZE_BYTES)
            lib.pp_multifd_scatter(pages, block, self._packet, received)
        self.pages += head.pages


class MultifdReceiver:
    """The multifd channels of one incoming migration. `on_error` is called on a channel's thread."""

    def __init__(
        self,
        fds: Sequence[int],
        cancel_fd: int,
        *,
        method: str,
        uuid: bytes | None,
        on_error: Callable[[], None],
    ) -> None:
        self.method = method
        self.uuid = uuid
        self.count = len(fds)
        self.is_closed = False
        self.receiver: PageReceiver
        self._on_error = on_error
        self._lock = threading.Lock()  # protects _numbers
        self._numbers: set[int] = set()
        self._channels = [_Channel(self, StreamReader(fd, cancel_fd), n) for n, fd in enumerate(fds)]

    def introduce(self, number: int) -> None:
        """A channel has said its number. Raises IllegalRecord if another one has it."""
        with self._lock:
            if number in self._numbers:
                raise IllegalRecord("multifd channel", offset=24, expected="each once", got=number)
            self._numbers.add(number)

    def failed(self, error: BaseException) -> None:
        """A channel is of no use any more: mig/load must not wait for the main stream alone."""
        if not self.is_closed:
            log.info("a multifd channel ends: %s", error)
            self._on_error()

    def sync(self, receiver: PageReceiver) -> None:
        """The main stream is at EOS: wait until every channel is, and take over what it has received.

        Raises what a channel has failed with.
        """
        if not self._channels[0].thread.ident:
            self.receiver = receiver
            for channel in self._channels:
                channel.received = {b.name: Bitmap(b.page_count) for b in receiver.blocks.blocks}
            for channel in self._channels:
                channel.thread.start()
        for channel in self._channels:
            channel.synced.acquire()
            if channel.error is not None:
                raise channel.error
        for channel in self._channels:
            for name, bitmap in channel.received.items():
                receiver.received[name].or_(bitmap)
                receiver.blocks.maps["zero"][name].andnot(bitmap)
                bitmap.fill(False)
            receiver.struct.normal_pages += channel.pages
            channel.pages = 0
            channel.may_go_on.release()

    def check(self) -> None:
        """Raises what a channel has failed with, its end aside."""
        for channel in self._channels:
            if channel.error is not None and not isinstance(channel.error, PeerClosed | Cancelled):
                raise channel.error

    def close(self, end_channels: Callable[[], None]) -> None:
        """Join the threads; `end_channels` makes their reads end."""
        self.is_closed = True
        end_channels()
        for channel in self._channels:
            channel.may_go_on.release()
            if channel.thread.ident is not None:
                channel.thread.join()
