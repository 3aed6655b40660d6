"""A ByteSource that gets its bytes one at a time, as the slowest peer would send them."""

from __future__ import annotations

from vmm.errors import StreamTruncated

__all__ = ["ByteByByte"]


class ByteByByte:
    """Holds at most what was asked for; each byte arrives by itself."""

    def __init__(self, raw: bytes) -> None:
        self._to_come = list(raw)
        self._buffer = bytearray()
        self._offset = 0

    @property
    def offset(self) -> int:
        return self._offset

    def _receive(self, count: int) -> None:
        while len(self._buffer) < count and self._to_come:
            self._buffer.append(self._to_come.pop(0))

    def read(self, n: int) -> bytes:
        self._receive(n)
        if len(self._buffer) < n:
            raise StreamTruncated(n, len(self._buffer), offset=self._offset)
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        self._offset += n
        return data

    def peek(self, n: int) -> bytes:
        self._receive(n)
        return bytes(self._buffer[:n])
