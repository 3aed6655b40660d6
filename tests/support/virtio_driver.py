"""A plain virtio driver for tests: sets a device up by its MMIO registers and keeps the rings in guest RAM.

It is the reference that the device is compared with: a split virtqueue by the book, one request a chain.
"""

from __future__ import annotations

import struct

from vmm.devices.virtio.device import RING_FEATURES
from vmm.devices.virtio.transport import MmioTransport
from vmm.ram import GuestRam, RAMBlock

__all__ = ["INDIRECT", "NEXT", "WRITE", "Driver", "memory"]

NEXT, WRITE, INDIRECT = 1, 2, 4
RING_STRIDE = 0x8000
BUFFERS = 0x80000
MIB = 1 << 20


def memory(length: int = 4 * MIB) -> GuestRam:
    """RAM of its own."""
    return GuestRam([RAMBlock("ram", length)])


class Driver:
    """One device, queues of `size` entries at fixed places from `base` on."""

    def __init__(self, ram: GuestRam, transport: MmioTransport, size: int = 16, base: int = 0) -> None:
        self.ram = ram
        self.transport = transport
        self.size = size
        self.next_avail: dict[int, int] = {}
        self.next_used: dict[int, int] = {}
        self._base = base
        self._buffer = base + BUFFERS

    def get(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    def put(self, offset: int, value: int, size: int = 4) -> None:
        self.transport.write(offset, size, value)

    def start(self, queues: list[int], features: int = RING_FEATURES) -> None:
        """Reset, negotiate, set the queues up, DRIVER_OK."""
        self.put(0x70, 0)
        for status in (1, 3):
            self.put(0x70, status)
        for select in (0, 1):
            self.put(0x24, select)
            self.put(0x20, features >> 32 * select & 0xFFFFFFFF)
        self.put(0x70, 11)
        assert self.get(0x70) & 8, "the features were refused"
        for queue in queues:
            self.enable(queue)
        self.put(0x70, 15)

    def ring(self, queue: int) -> tuple[int, int, int]:
        """Where descriptors, available and used ring of a queue are."""
        base = self._base + 0x1000 + queue * RING_STRIDE
        return base, base + 0x5000, base + 0x6000

    def enable(self, queue: int) -> None:
        self.put(0x30, queue)
        assert self.get(0x34) == 1024
        self.put(0x38, self.size)
        for offset, address in zip((0x80, 0x90, 0xA0), self.ring(queue), strict=True):
            self.put(offset, address)
            self.put(offset + 4, 0)
        self.put(0x44, 1)
        self.next_avail[queue] = self.next_used[queue] = 0

    def room(self, length: int) -> int:
        """A place for a buffer; places are used again after a while."""
        if self._buffer + length > self.ram.length_bytes:
            self._buffer = self._base + BUFFERS
        self._buffer += length
        return self._buffer - length

    def describe(
        self, queue: int, index: int, address: int, length: int, flags: int, following: int = 0
    ) -> None:
        raw = struct.pack("<QIHH", address, length, flags, following)
        self.ram.write(self.ring(queue)[0] + 16 * index, raw)

    def offer(self, queue: int, head: int) -> None:
        """Make the chain at `head` available."""
        avail = self.ring(queue)[1]
        index = self.next_avail[queue]
        self.ram.write(avail + 4 + 2 * (index % self.size), struct.pack("<H", head))
        self.next_avail[queue] = (index + 1) & 0xFFFF
        self.ram.write(avail + 2, struct.pack("<H", self.next_avail[queue]))

    def send(
        self, queue: int, readable: list[bytes], writable: list[int], *, indirect: bool = False
    ) -> list[int]:
        """Make one request available, from descriptor 0 on; where its writable buffers are."""
        entries, places = [], []
        for data in readable:
            self.ram.write(at := self.room(len(data)), data)
            entries.append((at, len(data), 0))
        for length in writable:
            places.append(self.room(length))
            entries.append((places[-1], length, WRITE))
        raw = b"".join(
            struct.pack("<QIHH", at, length, flags | (NEXT if n + 1 < len(entries) else 0), n + 1)
            for n, (at, length, flags) in enumerate(entries)
        )
        if indirect:
            self.ram.write(table := self.room(len(raw)), raw)
            self.describe(queue, 0, table, len(raw), INDIRECT)
        else:
            assert len(entries) <= self.size
            self.ram.write(self.ring(queue)[0], raw)
        self.offer(queue, 0)
        return places

    def notify(self, queue: int) -> None:
        self.put(0x50, queue)

    def used(self, queue: int) -> list[tuple[int, int]]:
        """What the device has given back since the last call: (head, length)."""
        used = self.ring(queue)[2]
        (index,) = struct.unpack("<H", self.ram.read(used + 2, 2))
        entries = []
        while self.next_used[queue] != index:
            at = used + 4 + 8 * (self.next_used[queue] % self.size)
            entries.append(struct.unpack("<II", self.ram.read(at, 8)))
            self.next_used[queue] = (self.next_used[queue] + 1) & 0xFFFF
        return entries
