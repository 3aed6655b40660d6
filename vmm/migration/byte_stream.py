"""The two ends of a migration channel as Python uses them: bytes out, bytes in.

Both wrap the page pump's buffers, so that records written or parsed by Python and pages moved by C share one
place in the stream. A descriptor is non-blocking; a partial or EAGAIN write goes on at the exact byte; every
wait ends when the cancel eventfd becomes readable. One thread at a time uses an object.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from vmm.errors import StreamTruncated
from vmm.migration.page_pump.native import check, ffi, lib, wait_fd

__all__ = ["StreamReader", "StreamWriter"]

WRITE_BUFFER_BYTES = 64 << 10
READ_BUFFER_BYTES = 1 << 20
"""The most that can be asked for at once."""

READ_BYTES = 256 << 10
"""Measured: to read more by one system call moves no more pages a second, and takes as much memory."""

_new_untouched = ffi.new_allocator(should_clear_after_alloc=False)
"""For large buffers: what no byte is ever read into takes no memory. A return path's hardly begins to."""


class StreamWriter:
    """Buffered bytes into `fd`."""

    def __init__(self, fd: int, cancel_fd: int) -> None:
        self._buffer = ffi.new("uint8_t[]", WRITE_BUFFER_BYTES)
        self.struct = ffi.new("struct pp_writer *")
        self.struct.fd = fd
        self.struct.cancel_fd = cancel_fd
        self.struct.buffer = self._buffer
        self.struct.size = WRITE_BUFFER_BYTES

    @property
    def total_bytes(self) -> int:
        """Bytes written so far, those still buffered included."""
        return int(self.struct.total + self.struct.used)

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken so far."""
        return int(self.struct.total)

    def write(self, data: bytes) -> None:
        """Queue `data`; it is sent with the next flush or page at the latest.

        Raises:
            OSError: the peer is gone, or the disk is full.
            Cancelled: the migration was cancelled while waiting for room.
        """
        check(lib.pp_writer_put(self.struct, data, len(data)), "Unable to write to the channel")

    def limit_backlog(self, size_bytes: int) -> None:
        """How much may wait in the kernel for the peer to read it. A pipe or a file has its own size."""
        with contextlib.suppress(OSError):
            # Not a duplicate: of a pipe's end it would stay open, as there is no socket to close it with.
            borrowed = socket.socket(fileno=self.struct.fd)
            try:
                borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)
            finally:
                borrowed.detach()

    def wait_for_room(self) -> None:
        """Wait until the kernel takes more: most of the backlog has been read then. Raises Cancelled."""
        wait_fd(self.struct.fd, self.struct.cancel_fd, for_write=True)

    def flush(self) -> None:
        """Hand everything to the kernel. Raises as `write`."""
        check(lib.pp_writer_flush(self.struct), "Unable to write to the channel")


class StreamReader:
    """Buffered bytes out of `fd`; a `ByteSource`, so that every parser of records can read from it."""

    def __init__(self, fd: int, cancel_fd: int, timeout_ms: int = -1) -> None:
        self._buffer = _new_untouched("uint8_t[]", READ_BUFFER_BYTES)
        self.struct = ffi.new("struct pp_reader *")
        self.struct.fd = fd
        self.struct.cancel_fd = cancel_fd
        self.struct.buffer = self._buffer
        self.struct.size = READ_BUFFER_BYTES
        self.struct.most = READ_BYTES
        self.struct.timeout_ms = timeout_ms

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed so far."""
        return int(self.struct.offset)

    @property
    def received_bytes(self) -> int:
        """Bytes that have come so far, consumed or not; any thread may ask, and gets a recent figure."""
        return self.offset + self._left()

    def _left(self) -> int:
        return int(self.struct.tail - self.struct.head)

    def read(self, n: int) -> bytes:
        """Exactly `n` bytes.

        Raises:
            StreamTruncated: the stream ends before.
            OSError: the descriptor failed; ETIMEDOUT when a wait took longer than the timeout.
            Cancelled: the cancel eventfd became readable.
        """
        if 0 < n <= 64 and self._left() >= n:
            head = self.struct.head
            self.struct.head = head + n
            self.struct.offset += n
            return bytes(ffi.buffer(self._buffer + head, n))
        data = ffi.new("uint8_t[]", max(n, 1))
        start = self.offset
        result = lib.pp_reader_take(self.struct, data, n)
        if result == -errno.ENODATA:
            got = self.offset - start + self._left()
            raise StreamTruncated(n, got, offset=start)
        check(result, "Unable to read from the channel")
        return bytes(ffi.buffer(data, n)) if n else b""

    def peek(self, n: int) -> bytes:
        """Up to `n` bytes (at most the buffer's size) that stay unread; fewer only at the end of the stream.

        Raises:
            OSError, Cancelled: as `read`.
        """
        result = lib.pp_reader_need(self.struct, n)
        if result != -errno.ENODATA:
            check(result, "Unable to read from the channel")
        return bytes(ffi.buffer(self._buffer + self.struct.head, min(n, self._left())))
