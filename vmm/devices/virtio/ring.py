"""A split virtqueue, the device's side: chains of buffers out of guest RAM, and used entries back.

    descriptors  16 B each: address u64, length u32, flags u16 (1 next, 2 device writes, 4 indirect), next u16
    available    flags u16, idx u16, heads u16[size], used_event u16      written by the driver
    used         flags u16, idx u16, (head u32, length u32)[size], avail_event u16      written by the device

Rules:
1. Nothing that the guest wrote is believed: each index is below the queue's size, a chain is no longer than
   MAX_SEGMENTS, each buffer is RAM. What breaks a rule raises RingError, which ends the queue until a reset.
2. Guest RAM is touched through `GuestRam` only, which marks it and drops translated code. A touch may wait
   for a page that is still at a migration source, so no thread comes here that must not wait.
3. The caller serialises: one lock of the device covers its queues.

Source: Virtual I/O Device (VIRTIO) 1.1, 2.6 "Split Virtqueues".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from vmm.errors import DeviceError
from vmm.ram import GuestRam

__all__ = ["MAX_SEGMENTS", "MAX_SIZE", "Buffer", "Chain", "RingError", "Virtqueue", "gather", "scatter"]

MAX_SIZE = 1024
MAX_SEGMENTS = 1024
"""As in QEMU: buffers of one chain."""

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
AVAIL_NO_INTERRUPT = 1
DESCRIPTOR = struct.Struct("<QIHH")
CHUNK_BYTES = 1 << 20
"""Arbitrary: how much of a request is copied at once."""

Buffer = tuple[int, int]
"""Guest physical address and length in bytes."""


class RingError(DeviceError):
    """The driver has broken the rules of the ring."""


@dataclass
class Chain:
    """One request. `generation` tells a queue that was reset meanwhile."""

    head: int
    readable: list[Buffer] = field(default_factory=list)
    writable: list[Buffer] = field(default_factory=list)
    generation: int = 0


def length_of(buffers: list[Buffer]) -> int:
    """Bytes of all of them."""
    return sum(length for _, length in buffers)


def pieces(buffers: list[Buffer], skip: int, length: int) -> Iterator[Buffer]:
    """`length` bytes of the buffers after the first `skip`, as far as there are any, in bounded pieces."""
    for address, size in buffers:
        if skip >= size:
            skip -= size
            continue
        address, size, skip = address + skip, size - skip, 0
        size = min(size, length)
        length -= size
        while size:
            step = min(size, CHUNK_BYTES)
            yield address, step
            address, size = address + step, size - step
        if not length:
            return


def gather(ram: GuestRam, buffers: list[Buffer], skip: int, length: int) -> bytes:
    """Up to `length` bytes out of the buffers. May wait for pages; `length` is the caller's to bound."""
    return b"".join(ram.read(at, size, may_wait=True) for at, size in pieces(buffers, skip, length))


def scatter(ram: GuestRam, buffers: list[Buffer], skip: int, data: bytes) -> int:
    """Into the buffers; how many bytes fitted. May wait for pages."""
    done = 0
    for address, size in pieces(buffers, skip, len(data)):
        ram.write(address, memoryview(data)[done : done + size], may_wait=True)
        done += size
    return done


class Virtqueue:
    """One queue. `size`, the addresses and `ready` are the transport's; the rest moves with requests."""

    def __init__(self, ram: GuestRam, default_size: int) -> None:
        self._ram = ram
        self.default_size = default_size
        self.generation = 0
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        self.generation += 1
        self.size = self.default_size
        self.desc = self.avail = self.used = 0
        self.ready = False
        self.last_avail = self.used_idx = 0
        self.event_idx = False
        self._signalled: int | None = None  # used idx when the driver was last told
        self.staged = [0] * 6  # what the transport's address registers hold: desc, avail, used; low, high
        self.staged_size = 0

    def enable(self) -> None:
        """Use the addresses. Raises RingError unless all of the ring is RAM."""
        parts = ((self.desc, 16 * self.size), (self.avail, 6 + 2 * self.size), (self.used, 6 + 8 * self.size))
        for address, length in parts:
            if not self._ram.contains(address, length):
                raise RingError(f"A ring of {self.size} entries at {address:#x} is not in RAM")
        self.ready = True

    def disable(self) -> None:
        """Requests under way are answered no more."""
        self.ready = False
        self.generation += 1

    def resync(self) -> int:
        """After a load: learn the used index from the ring, and give how many requests are under way.

        Raises RingError if the indices cannot be.
        """
        self.enable()
        self.used_idx = self._u16(self.used + 2)
        self._signalled = None
        pending = (self.last_avail - self.used_idx) & 0xFFFF
        if pending > self.size:
            raise RingError(
                f"Last avail {self.last_avail} and used {self.used_idx} are too far apart: {pending}"
            )
        self._available()
        return pending

    # ---- out of the available ring

    def _u16(self, address: int) -> int:
        return int.from_bytes(self._ram.read(address, 2, may_wait=True), "little")

    def _available(self) -> int:
        index = self._u16(self.avail + 2)
        count = (index - self.last_avail) & 0xFFFF
        if count > self.size:
            raise RingError(f"The driver moved the available index from {self.last_avail} to {index}")
        return count

    @property
    def is_empty(self) -> bool:
        """Has the driver nothing for us? Asks to be told of the next if so."""
        if not self.ready:
            return True
        if self._available():
            return False
        if self.event_idx:
            self._ram.write(
                self.used + 4 + 8 * self.size, self.last_avail.to_bytes(2, "little"), may_wait=True
            )
            return not self._available()
        return True

    def pop(self) -> Chain | None:
        """The next request, None if there is none. Raises RingError."""
        if self.is_empty:
            return None
        chain = self._peek(0)
        self.last_avail = (self.last_avail + 1) & 0xFFFF
        return chain

    def _peek(self, ahead: int) -> Chain:
        slot = (self.last_avail + ahead) % self.size
        head = self._u16(self.avail + 4 + 2 * slot)
        return self._chain(head)

    def waiting(self) -> Iterator[Chain]:
        """The requests that are available, left where they are. Raises RingError."""
        if self.ready:
            for ahead in range(self._available()):
                yield self._peek(ahead)

    def _chain(self, head: int) -> Chain:
        chain = Chain(head, generation=self.generation)
        table, size, index, indirect = self.desc, self.size, head, False
        for _ in range(MAX_SEGMENTS + 1):
            if index >= size:
                raise RingError(f"Descriptor {index} in a table of {size}")
            raw = self._ram.read(table + 16 * index, 16, may_wait=True)
            address, length, flags, following = DESCRIPTOR.unpack(raw)
            if flags & DESC_INDIRECT:
                if indirect or flags & DESC_NEXT or chain.readable or chain.writable:
                    raise RingError(f"An indirect table within a chain (descriptor {index})")
                if not length or length % 16 or length > 16 * MAX_SEGMENTS:
                    raise RingError(f"An indirect table of {length} bytes")
                self._check_ram(address, length)
                table, size, index, indirect = address, length // 16, 0, True
                continue
            self._add(chain, address, length, bool(flags & DESC_WRITE))
            if not flags & DESC_NEXT:
                return chain
            index = following
        raise RingError(f"A chain of more than {MAX_SEGMENTS} buffers from descriptor {head}")

    def _add(self, chain: Chain, address: int, length: int, writable: bool) -> None:
        if not length:
            raise RingError(f"An empty buffer at {address:#x}")
        if chain.writable and not writable:
            raise RingError("A buffer for the device to read behind one to write")
        self._check_ram(address, length)
        (chain.writable if writable else chain.readable).append((address, length))

    def _check_ram(self, address: int, length: int) -> None:
        if not self._ram.contains(address, length):
            raise RingError(f"{length:#x} bytes at {address:#x} are not all RAM")

    # ---- into the used ring

    def push(self, chain: Chain, written: int) -> bool:
        """The request is done, `written` bytes are in its writable buffers. True: tell the driver."""
        if chain.generation != self.generation or not self.ready:
            return False
        entry = struct.pack("<II", chain.head, written)
        self._ram.write(self.used + 4 + 8 * (self.used_idx % self.size), entry, may_wait=True)
        old, self.used_idx = self.used_idx, (self.used_idx + 1) & 0xFFFF
        self._ram.write(self.used + 2, self.used_idx.to_bytes(2, "little"), may_wait=True)
        return self._wants_interrupt(old)

    def _wants_interrupt(self, old: int) -> bool:
        if not self.event_idx:
            return not self._u16(self.avail) & AVAIL_NO_INTERRUPT
        signalled, self._signalled = self._signalled, self.used_idx
        if signalled is None:
            return True
        event = self._u16(self.avail + 4 + 2 * self.size)
        return (self.used_idx - event - 1) & 0xFFFF < (self.used_idx - signalled) & 0xFFFF
