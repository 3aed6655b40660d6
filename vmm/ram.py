"""Guest RAM: RAMBlocks, where the guest sees them, and the only way in for everyone but the guest.

Rules of this file:

1. RAM is touched by copies that C makes with the GIL released; there is no view of it. A touch may wait for
   a page that is still at the migration source, and what brings the page may need the GIL.
2. A write or discard that is not a guest store is told to the write listeners after its bytes are in place:
   the dirty log marks the pages, the CPU engine drops translated code.
3. A block keeps its host address for life.
4. While the read guard says that a page has not been received, an access on behalf of a user fails with
   PageNotReceived. Only callers that may wait (the vCPU's devices, a load) pass `may_wait=True`.

    guest addresses, `none`            `microvm` (as stock QEMU's)
    0 ──────────── end of RAM          0 ─────────── 3 GiB    4 GiB ──────────
      first block, then next             RAM          (hole)    the rest of it
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

from uffd import PAGE_SIZE_BYTES, Mapping, MappingKind, PagemapScanner, UffdError
from vmm.errors import PageferryError

__all__ = [
    "MICROVM_HOLE",
    "PAGE_SIZE_BYTES",
    "GuestRam",
    "PageNotReceived",
    "RAMBlock",
    "RamError",
    "RamKind",
    "ReadGuard",
    "Region",
    "WriteListener",
]

RamKind = MappingKind

GIB = 1 << 30

MICROVM_HOLE = (3 * GIB, 4 * GIB)
"""Guest addresses without RAM on `microvm`: hw/i386/microvm.c, microvm_memory_init."""

MAXIMUM_BYTES = 64 * GIB

WriteListener = Callable[["RAMBlock", int, int], None]
"""Called with block, offset and length in bytes after a write that was no guest store, on its thread."""

ReadGuard = Callable[["RAMBlock", int, int], bool]
"""Called with block, first page and page count: may all of these pages be touched without waiting?"""


class RamError(PageferryError):
    """Guest RAM cannot be made, or an address is outside of it."""


class PageNotReceived(RamError):
    """A page of the range is still at the migration source. `first_page` and `page_count` are the range."""

    def __init__(self, block: str, first_page: int, page_count: int) -> None:
        super().__init__(
            f"Pages {first_page}..{first_page + page_count - 1} of RAMBlock '{block}' have not all been "
            "received from the migration source"
        )
        self.block = block
        self.first_page = first_page
        self.page_count = page_count


class RAMBlock:
    """A named piece of guest RAM, all zeroes at first. Nothing of it is allocated before it is touched.

    Offsets and lengths are in bytes. Every method raises RamError for a range that is not inside of the
    block. Any thread may call any method but `close`.
    """

    def __init__(self, name: str, length_bytes: int, kind: RamKind = RamKind.ANONYMOUS) -> None:
        """Raises RamError if the length is not whole pages between 1 page and 64 GiB, or not to be had."""
        if not 0 < length_bytes <= MAXIMUM_BYTES or length_bytes % PAGE_SIZE_BYTES:
            raise RamError(
                f"RAMBlock '{name}' cannot have {length_bytes} bytes: expected a multiple of "
                f"{PAGE_SIZE_BYTES} up to {MAXIMUM_BYTES // GIB} GiB"
            )
        try:
            self._mapping = Mapping(length_bytes, kind, name=name)
        except UffdError as error:
            raise RamError(f"Cannot allocate {length_bytes} bytes for RAMBlock '{name}'") from error
        self.name = name
        self.length_bytes = length_bytes
        self.page_count = length_bytes // PAGE_SIZE_BYTES
        self.kind = kind
        self.host_address = self._mapping.address
        self.fd = self._mapping.fd
        self._listeners: tuple[WriteListener, ...] = ()
        self._guard: ReadGuard | None = None

    def read(self, offset: int, length: int, *, may_wait: bool = False) -> bytes:
        """A copy of a range. Raises PageNotReceived, unless the caller may wait for the page."""
        self._admit(offset, length, may_wait)
        return self._mapping.read(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, may_wait: bool = False) -> None:
        """Store `data` and tell the listeners. Raises PageNotReceived as `read`, with nothing written."""
        length = memoryview(data).nbytes
        self._admit(offset, length, may_wait)
        if length:
            self._mapping.write(offset, data)
            self.notify_written(offset, length)

    def fill(self, offset: int, length: int, value: int, *, may_wait: bool = False) -> None:
        """Store `length` times the byte `value`; as `write`."""
        self._admit(offset, length, may_wait)
        if length:
            self._mapping.fill(offset, length, value)
            self.notify_written(offset, length)

    def is_equal(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether the range from `offset` on holds `data`. Raises PageNotReceived."""
        self._admit(offset, memoryview(data).nbytes, may_wait=False)
        return self._mapping.is_equal(offset, data)

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether a range holds zeroes only. Raises PageNotReceived."""
        self._admit(offset, length, may_wait=False)
        return self._mapping.is_zero(offset, length)

    def discard(self, first_page: int, page_count: int) -> None:
        """Give pages back: they read as zeroes, or are missing where that is registered."""
        offset, length = first_page * PAGE_SIZE_BYTES, page_count * PAGE_SIZE_BYTES
        self._check(offset, length)
        if length:
            self._mapping.discard(offset, length)
            self.notify_written(offset, length)

    def discard_all(self) -> None:
        """Give the whole block back."""
        self.discard(0, self.page_count)

    def notify_written(self, offset: int, length: int) -> None:
        """Tell the listeners of bytes that were stored past this object: pages placed by native code."""
        for listener in self._listeners:
            listener(self, offset, length)

    def use_huge_pages(self, wanted: bool) -> None:
        """Ask for huge pages or rule them out. Must be off before pages are discarded or placed singly.

        A memfd never has them: the kernel may split one by dropping its mapping, and with it the mark that
        says which of its pages were written.
        """
        self._mapping.use_huge_pages(wanted and self.kind is RamKind.ANONYMOUS)

    def find_populated(self, bitmap_address: int) -> int:
        """OR the pages that may hold anything but zeroes into the bitmap there; the number of new bits.

        A page that is touched for the first time during the call may be in it or not. Must not be used while
        the block is write-protected in a way that leaves markers for pages that do not exist.

        Raises UffdError if the kernel does not tell.
        """
        found = 0
        if self.kind is not RamKind.ANONYMOUS:
            found += self._mapping.find_data(0, self.length_bytes, bitmap_address)
        if self.kind is not RamKind.MEMFD_SHARED:
            scanner = PagemapScanner()
            try:
                found += scanner.find_populated(self.host_address, self.length_bytes, bitmap_address)
            finally:
                scanner.close()
        return found

    def find_file_data(self, bitmap_address: int) -> int:
        """OR the pages that exist in the memfd into the bitmap there; the number of new bits.

        Raises RamError for an anonymous block.
        """
        if self.fd is None:
            raise RamError(f"RAMBlock '{self.name}' is anonymous, it has no file")
        return self._mapping.find_data(0, self.length_bytes, bitmap_address)

    def populate_for_reading(self) -> None:
        """Map the page of zeroes wherever there is none yet. Raises UffdError (before Linux 5.14)."""
        self._mapping.populate_for_reading()

    def close(self) -> None:
        """Unmap. Only when no other thread, engine or userfaultfd knows the address any more."""
        self._mapping.close()
        self.host_address = 0
        self.fd = None

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.length_bytes:
            raise RamError(
                f"{length} bytes at {offset:#x} are not inside of RAMBlock '{self.name}' "
                f"({self.length_bytes:#x} bytes)"
            )

    def _admit(self, offset: int, length: int, may_wait: bool) -> None:
        self._check(offset, length)
        guard = self._guard
        if guard is None or may_wait or length == 0:
            return
        first = offset // PAGE_SIZE_BYTES
        count = (offset + length - 1) // PAGE_SIZE_BYTES - first + 1
        if not guard(self, first, count):
            raise PageNotReceived(self.name, first, count)


@dataclasses.dataclass(frozen=True)
class Region:
    """`length` bytes of `block` from `offset` on, which the guest sees at `guest_address`."""

    guest_address: int
    block: RAMBlock
    offset: int
    length: int

    @property
    def host_address(self) -> int:
        """Where the region's first byte is in this process."""
        return self.block.host_address + self.offset


def lay_out(blocks: Sequence[RAMBlock], hole: tuple[int, int] | None) -> tuple[Region, ...]:
    """The blocks one after the other from guest address 0 on, around `hole` (first address, end)."""
    regions = []
    address = 0
    for block in blocks:
        offset = 0
        while offset < block.length_bytes:
            if hole is not None and hole[0] <= address < hole[1]:
                address = hole[1]
            room = hole[0] - address if hole is not None and address < hole[0] else block.length_bytes
            length = min(room, block.length_bytes - offset)
            regions.append(Region(address, block, offset, length))
            address += length
            offset += length
    return tuple(regions)


class GuestRam:
    """All RAMBlocks of a machine and its guest memory map. Any thread may call any method but `close`."""

    def __init__(self, blocks: Sequence[RAMBlock], hole: tuple[int, int] | None = None) -> None:
        """`hole` is MICROVM_HOLE or None. Raises RamError if two blocks have one name."""
        names = [block.name for block in blocks]
        for name in names:
            if names.count(name) > 1:
                raise RamError(f"Two RAMBlocks are called '{name}'")
        self.blocks = tuple(blocks)
        self.map = lay_out(blocks, hole)
        self._lock = threading.Lock()  # protects the replacement of the blocks' listeners

    @property
    def regions(self) -> list[tuple[int, int]]:
        """Where the guest sees RAM: (guest address, length), in ascending order."""
        return [(region.guest_address, region.length) for region in self.map]

    @property
    def length_bytes(self) -> int:
        """Of all blocks together."""
        return sum(block.length_bytes for block in self.blocks)

    def read(self, guest_address: int, length: int, *, may_wait: bool = False) -> bytes:
        """A copy of guest memory. Raises RamError where there is no RAM, PageNotReceived as a block does."""
        pieces = self._pieces(guest_address, length)
        return b"".join(block.read(offset, size, may_wait=may_wait) for block, offset, size in pieces)

    def write(
        self, guest_address: int, data: bytes | bytearray | memoryview, *, may_wait: bool = False
    ) -> None:
        """Store `data` at a guest address; as `read`. Nothing is written where some of it is not RAM."""
        view = memoryview(data).cast("B")
        for block, offset, size in self._pieces(guest_address, view.nbytes):
            block.write(offset, view[:size], may_wait=may_wait)
            view = view[size:]

    def contains(self, guest_address: int, length: int) -> bool:
        """Is all of that range RAM? Touches nothing."""
        address, end = guest_address, guest_address + length
        for region in self.map:  # in ascending order
            if region.guest_address <= address < region.guest_address + region.length:
                address = min(end, region.guest_address + region.length)
        return address == end and length >= 0

    def guest_ranges(self, block: RAMBlock, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Where the guest sees a range of a block: (guest address, length), in bytes."""
        for region in self.map:
            first = max(offset, region.offset)
            end = min(offset + length, region.offset + region.length)
            if region.block is block and first < end:
                yield region.guest_address + first - region.offset, end - first

    def add_write_listener(self, listener: WriteListener) -> None:
        """Have `listener` called after each write and discard that is not a guest store."""
        with self._lock:
            for block in self.blocks:
                block._listeners = (*block._listeners, listener)

    def remove_write_listener(self, listener: WriteListener) -> None:
        """Undo `add_write_listener`; a call that has begun may still end later."""
        with self._lock:
            for block in self.blocks:
                block._listeners = tuple(known for known in block._listeners if known != listener)

    def set_read_guard(self, guard: ReadGuard | None) -> None:
        """Have `guard` decide which pages may be touched for a user; None: all of them."""
        for block in self.blocks:
            block._guard = guard

    def close(self) -> None:
        """Unmap all blocks; see `RAMBlock.close`."""
        for block in self.blocks:
            block.close()

    def _pieces(self, guest_address: int, length: int) -> list[tuple[RAMBlock, int, int]]:
        pieces = []
        address, end = guest_address, guest_address + length
        for region in self.map:  # in ascending order
            if region.guest_address <= address < min(end, region.guest_address + region.length):
                offset = region.offset + address - region.guest_address
                size = min(end, region.guest_address + region.length) - address
                pieces.append((region.block, offset, size))
                address += size
        if address != end or length < 0:
            raise RamError(f"{length} bytes at guest address {guest_address:#x} are not all RAM")
        return pieces
