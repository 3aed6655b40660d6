"""virtio-rng: bytes from the host's random number generator.

Source: Virtual I/O Device (VIRTIO) 1.1, 5.4 "Entropy Device".
"""

from __future__ import annotations

import os

from vmm.devices.virtio.device import ISR_QUEUE, VirtioDevice
from vmm.devices.virtio.ring import length_of, scatter
from vmm.ram import GuestRam

__all__ = ["VirtioRng"]

QUEUE_SIZE = 8
REQUEST_LIMIT_BYTES = 4096
"""Arbitrary: a driver that asks for more gets this much of it."""


class VirtioRng(VirtioDevice):
    """Answers at once, on the vCPU's thread: reading the host's generator does not wait."""

    kind = "virtio-rng"
    device_id = 4

    def __init__(self, ram: GuestRam) -> None:
        super().__init__(ram, [QUEUE_SIZE])

    def notified(self, index: int) -> None:
        self._answer()

    def process(self) -> bool:
        self.guard(self._answer)
        return False

    def _answer(self) -> None:
        queue = self.queues[0]
        tell = False
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            data = os.urandom(min(length_of(chain.writable), REQUEST_LIMIT_BYTES))
            tell = queue.push(chain, scatter(self.ram, chain.writable, 0, data)) or tell
        if tell:
            self.interrupt(ISR_QUEUE)
