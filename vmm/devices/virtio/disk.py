"""A raw disk image: a file or block device, read and written at offsets. Any thread."""

from __future__ import annotations

import os
import stat
import threading

from vmm.errors import DeviceError

__all__ = ["SECTOR_BYTES", "RawDisk"]

SECTOR_BYTES = 512


class RawDisk:
    """`length_bytes` is what the file has, cut to whole sectors. It does not grow."""

    def __init__(self, path: str, *, read_only: bool) -> None:
        """Raises DeviceError if the file cannot be opened, or is no file with a size."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DeviceError(f"Could not open '{path}': {error.strerror}") from error
        try:
            kind = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise DeviceError(f"Could not open '{path}': neither a file nor a block device")
            length = os.lseek(self._fd, 0, os.SEEK_END)
        except (OSError, DeviceError):
            os.close(self._fd)
            raise
        self.path = path
        self.read_only = read_only
        self.length_bytes = length // SECTOR_BYTES * SECTOR_BYTES
        self._lock = threading.Lock()  # protects the next
        self._unflushed = False

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes; zeroes where somebody has cut the file meanwhile. Raises OSError."""
        parts = []
        while length:
            data = os.pread(self._fd, length, offset)
            if not data:
                parts.append(bytes(length))
                break
            parts.append(data)
            offset, length = offset + len(data), length - len(data)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """All of it. Raises OSError."""
        with self._lock:
            self._unflushed = True
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            offset, view = offset + done, view[done:]

    def flush(self) -> None:
        """Wait until what was written is on the medium. Raises OSError."""
        with self._lock:
            unflushed, self._unflushed = self._unflushed, False
        if unflushed:
            try:
                os.fdatasync(self._fd)
            except OSError:
                with self._lock:
                    self._unflushed = True
                raise

    def close(self) -> None:
        """Only when no other thread uses it any more."""
        os.close(self._fd)
