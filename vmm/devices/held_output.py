"""Between a device and its sink: what a guest says after it was told to stop is kept until it goes on.

    vCPU --OUT--> UART --> HeldOutput --> sink                 the guest runs: straight through
                               |  stop: a vCPU parked on a page finishes its block when the page comes
                               +-> held, in order, until `release`

Whoever saw STOP hears nothing more of the guest. A block is short, so little is held. It belongs to the
host's side, as what a backend has queued does: it is given out when the guest goes on, or leaves for another
host.
"""

from __future__ import annotations

from vmm.devices.char_sink import CharSink

__all__ = ["HeldOutput"]

MOST_HELD_BYTES = 4096
"""More than a block has instructions; beyond it the device keeps the byte, as with a full backend."""


class HeldOutput:
    """Fits `CharSink`; the device's lock guards it."""

    def __init__(self, sink: CharSink) -> None:
        self.sink = sink
        self._held = bytearray()
        self._is_holding = False

    def hold(self) -> None:
        """Give nothing out from now on."""
        self._is_holding = True

    def release(self) -> None:
        """Give out what was held, as far as the sink takes it, and whatever comes."""
        self._is_holding = False
        self.flush()

    def flush(self) -> bool:
        """The sink may have room again; True if nothing is held any more."""
        if self._held and not self._is_holding:
            del self._held[: self.sink.write_nowait(bytes(self._held))]
        return not self._held

    @property
    def goes_through(self) -> bool:
        """Nothing is held, nor shall be."""
        return not (self._is_holding or self._held)

    def put(self, data: bytes) -> None:
        """Give out bytes that the device no longer has; what the sink does not take is held."""
        self._held += data[self.write_nowait(data) :]

    def write_nowait(self, data: bytes) -> int:
        """How many bytes were taken."""
        if self._is_holding:
            taken = data[: MOST_HELD_BYTES - len(self._held)]
            self._held += taken
            return len(taken)
        return self.sink.write_nowait(data) if self.flush() else 0
