"""The sixteen-byte ring of a 16550, in the form in which it travels (QEMU's Fifo8)."""

from __future__ import annotations

from vmm.errors import VMStateError
from vmm.vmstate import Description, Field, Values

__all__ = ["FIFO_BYTES", "FIFO_DESCRIPTION", "Fifo"]

FIFO_BYTES = 16

FIFO_DESCRIPTION = Description(
    "Fifo8", 1, 1, (Field("data", "buffer", FIFO_BYTES), Field("head", "uint32"), Field("num", "uint32"))
)


class Fifo:
    """First in, first out; the caller looks before it pushes or pops."""

    def __init__(self) -> None:
        self._data = bytearray(FIFO_BYTES)
        self._head = 0
        self.count = 0

    @property
    def is_full(self) -> bool:
        """There is no room for a byte."""
        return self.count == FIFO_BYTES

    def push(self, byte: int) -> None:
        """Add at the end of one that is not full."""
        assert not self.is_full
        self._data[(self._head + self.count) % FIFO_BYTES] = byte
        self.count += 1

    def pop(self) -> int:
        """Take the oldest of one that is not empty."""
        assert self.count
        byte = self._data[self._head]
        self._head = (self._head + 1) % FIFO_BYTES
        self.count -= 1
        return byte

    def clear(self) -> None:
        """Forget everything."""
        self._head = self.count = 0

    def save(self) -> Values:
        return {"data": bytes(self._data), "head": self._head, "num": self.count}

    def load(self, values: Values, where: str) -> None:
        """Raises VMStateError for a head or a count outside of the ring."""
        head, count = values["head"], values["num"]
        if head >= FIFO_BYTES or count > FIFO_BYTES:
            raise VMStateError("Impossible ring", where, expected=f"at most {FIFO_BYTES}", got=(head, count))
        self._data[:] = values["data"]
        self._head, self.count = head, count
