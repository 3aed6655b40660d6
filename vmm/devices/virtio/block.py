"""virtio-blk: a raw disk image behind one queue. Requests are done on the worker's thread, one by one.

    readable: type u32, reserved u32, sector u64, data to write ...     writable: data read ..., status u8

A request that cannot be done ends with status IOERR, one that is not known with UNSUPP; both are the
driver's to deal with. DISCARD is accepted and not passed on to the file, which the specification allows.

Sources: Virtual I/O Device (VIRTIO) 1.1, 5.2 "Block Device"; which features and limits: as QEMU 7.2's
defaults (hw/block/virtio-blk.c), so that a guest may move between both.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable

from vmm.devices.virtio.device import ISR_QUEUE, VirtioDevice
from vmm.devices.virtio.disk import SECTOR_BYTES, RawDisk
from vmm.devices.virtio.element import ELEMENT_BYTES, decode_element, encode_element
from vmm.devices.virtio.ring import CHUNK_BYTES, MAX_SIZE, Chain, RingError, gather, length_of, scatter
from vmm.errors import VMStateError
from vmm.ram import GuestRam, RamError

__all__ = ["VirtioBlock"]

log = logging.getLogger(__name__)

QUEUE_SIZE = 256
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
F_SEG_MAX, F_GEOMETRY, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1 << 2, 1 << 4, 1 << 5, 1 << 6, 1 << 9, 1 << 10
F_CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES = 1 << 11, 1 << 13, 1 << 14
ID_BYTES = 20
HEADER = struct.Struct("<IIQ")
RANGE = struct.Struct("<QII")
REQUEST_LIMIT_BYTES = 1 << 31
"""As QEMU's: a request is done in one go, and a stop or a reset waits for it."""
SEGMENT_LIMIT_SECTORS = 0x3FFFFF
CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB")
CONFIG_WCE_OFFSET = 32
UNMAP = 1


class _Failed(Exception):
    """A request ends with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


class VirtioBlock(VirtioDevice):
    """One disk."""

    kind = "virtio-blk"
    device_id = 2
    section_version = 2

    def __init__(self, ram: GuestRam, disk: RawDisk, serial: str = "") -> None:
        """The device owns the disk."""
        super().__init__(ram, [QUEUE_SIZE])
        self.disk = disk
        self._serial = serial.encode("utf-8", "replace")[:ID_BYTES]
        self.write_cache = True
        self._kept: list[Chain] = []  # begun, by a peer or for it, and not done
        self.own_features = F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        self.own_features |= F_RO if disk.read_only else F_DISCARD | F_WRITE_ZEROES

    def device_reset(self) -> None:
        self.write_cache = True
        self._kept = []

    def config(self) -> bytes:
        sectors = self.disk.length_bytes // SECTOR_BYTES
        cylinders = max(2, min(16383, sectors // (16 * 63)))
        limits = (SEGMENT_LIMIT_SECTORS, 1, 1, SEGMENT_LIMIT_SECTORS, 1, 1)
        return CONFIG.pack(
            sectors, 0, QUEUE_SIZE - 2, cylinders, 16, 63, SECTOR_BYTES, 0, 0, 0, 0,
            int(self.write_cache), 1, *limits,
        )  # fmt: skip

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == CONFIG_WCE_OFFSET and len(data) == 1 and self.features & F_CONFIG_WCE:
            self.write_cache = bool(data[0])

    # ---- requests; the worker's thread

    def process(self) -> bool:
        """One request."""
        chain = self.guard(self._next)
        if chain is None:
            return False
        try:
            status, written = self._perform(chain)
        except (RingError, RamError) as error:
            with self.lock:
                self.fail(str(error))
            return False
        self.guard(lambda: self._answer(chain, status, written))
        return True

    def begin_all(self) -> None:
        """Take what waits in the ring: it is to travel as begun. The vCPU is stopped, the device idle.

        A stock QEMU goes on with what was begun when its guest starts, but looks into the ring only when the
        driver tells it to, and the driver has told us.
        """
        self.guard(self._begin_all)

    def _begin_all(self) -> None:
        while self.queues[0].ready and (chain := self.queues[0].pop()) is not None:
            self._kept.append(chain)

    def _next(self) -> Chain | None:
        return self._kept.pop(0) if self._kept else self.queues[0].pop()

    def _answer(self, chain: Chain, status: int, written: int) -> None:
        address, length = chain.writable[-1]
        if chain.generation == self.queues[0].generation:
            self.ram.write(address + length - 1, bytes([status]), may_wait=True)
        if self.queues[0].push(chain, written + 1):
            self.interrupt(ISR_QUEUE)

    def _perform(self, chain: Chain) -> tuple[int, int]:
        """Status, and how many bytes went into the writable buffers. Raises RingError."""
        if length_of(chain.readable) < HEADER.size or not chain.writable:
            raise RingError("A block request without a header or without a status byte")
        kind, _, sector = HEADER.unpack(gather(self.ram, chain.readable, 0, HEADER.size))
        room = length_of(chain.writable) - 1
        try:
            if kind == T_IN:
                return S_OK, self._read(chain, sector, room)
            if kind == T_GET_ID:
                return S_OK, scatter(self.ram, chain.writable, 0, self._serial.ljust(ID_BYTES, b"\0")[:room])
            if kind == T_FLUSH:
                self.disk.flush()
            elif kind == T_OUT:
                self._write(chain, sector)
            elif kind in (T_DISCARD, T_WRITE_ZEROES):
                self._each_range(chain, self._zero if kind == T_WRITE_ZEROES else self._forget)
            else:
                return S_UNSUPP, 0
        except _Failed as failure:
            return failure.status, 0
        except OSError as error:
            log.error("%s: request %d at sector %d: %s", self.disk.path, kind, sector, error.strerror)
            return S_IOERR, 0
        return S_OK, 0

    def _check(self, sector: int, length: int) -> int:
        """The offset in the file. Raises _Failed."""
        if length > REQUEST_LIMIT_BYTES or length % SECTOR_BYTES:
            raise _Failed(S_IOERR)
        if sector * SECTOR_BYTES + length > self.disk.length_bytes:
            raise _Failed(S_IOERR)
        return sector * SECTOR_BYTES

    def _check_writable(self) -> None:
        if self.disk.read_only:
            raise _Failed(S_IOERR)

    def _read(self, chain: Chain, sector: int, length: int) -> int:
        offset = self._check(sector, length)
        for done in range(0, length, CHUNK_BYTES):
            data = self.disk.read(offset + done, min(CHUNK_BYTES, length - done))
            scatter(self.ram, chain.writable, done, data)
        return length

    def _write(self, chain: Chain, sector: int) -> None:
        self._check_writable()
        length = length_of(chain.readable) - HEADER.size
        offset = self._check(sector, length)
        for done in range(0, length, CHUNK_BYTES):
            size = min(CHUNK_BYTES, length - done)
            self.disk.write(offset + done, gather(self.ram, chain.readable, HEADER.size + done, size))
        self._end_of_write()

    def _end_of_write(self) -> None:
        if not self.write_cache or not self.features & F_FLUSH:
            self.disk.flush()

    def _each_range(self, chain: Chain, function: Callable[[int, int], None]) -> None:
        self._check_writable()
        length = length_of(chain.readable) - HEADER.size
        if length != RANGE.size:  # max_discard_seg and max_write_zeroes_seg are 1
            raise _Failed(S_UNSUPP if length > RANGE.size else S_IOERR)
        sector, sectors, flags = RANGE.unpack(gather(self.ram, chain.readable, HEADER.size, RANGE.size))
        allowed = UNMAP if function == self._zero else 0
        if flags & ~allowed:
            raise _Failed(S_UNSUPP)
        if sectors > SEGMENT_LIMIT_SECTORS:
            raise _Failed(S_IOERR)
        function(self._check(sector, sectors * SECTOR_BYTES), sectors * SECTOR_BYTES)

    def _forget(self, offset: int, length: int) -> None:
        return None

    def _zero(self, offset: int, length: int) -> None:
        for done in range(0, length, CHUNK_BYTES):
            self.disk.write(offset + done, bytes(min(CHUNK_BYTES, length - done)))
        self._end_of_write()

    # ---- what travels

    def save_own(self) -> bytes:
        """No request is under way; those that are begun and not done go along."""

        return b"".join(b"\1" + encode_element(chain) for chain in self._kept) + b"\0"

    def read_own(self, read: Callable[[int], bytes]) -> None:
        for _ in range(MAX_SIZE + 1):
            if read(1) == b"\0":
                return
            read(ELEMENT_BYTES)
        raise VMStateError("Too many requests under way", self.kind, expected=f"at most {MAX_SIZE}")

    def load_own(self, read: Callable[[int], bytes]) -> None:
        self._kept = []
        while read(1) != b"\0":
            self._kept.append(decode_element(read(ELEMENT_BYTES), self.ram, self.queues[0].generation))

    def load_config(self, data: bytes) -> None:
        # A driver that never looked has left nothing there: then it is on, as after a reset.
        if self.status and any(data) and len(data) > CONFIG_WCE_OFFSET:
            self.write_cache = bool(data[CONFIG_WCE_OFFSET])
