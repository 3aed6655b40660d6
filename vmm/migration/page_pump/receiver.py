"""The destination's half of the page pump: pages into guest RAM, faults into page requests."""

from __future__ import annotations

import enum
import weakref
from typing import TYPE_CHECKING

from vmm.migration.blocktime import Blocktime
from vmm.migration.page_pump.blocks import DESTINATION_MAPS, PumpBlocks
from vmm.migration.page_pump.failure import raise_for_pump
from vmm.migration.page_pump.native import check, ffi, lib
from vmm.migration.stats import FaultLatencies
from vmm.migration.wire import RamFlag

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.migration.bitmap import Bitmap
    from vmm.migration.byte_stream import StreamReader
    from vmm.ram import RAMBlock

__all__ = ["Heard", "PageReceiver", "ReturnPathWriter"]


class ReturnPathWriter:
    """Return path messages into `fd`; any thread, one lock in C around each message."""

    def __init__(self, fd: int, cancel_fd: int) -> None:
        self.struct = ffi.new("struct pp_return_path *")
        check(lib.pp_return_path_init(self.struct, fd, cancel_fd), "Cannot open the return path")
        self.close = weakref.finalize(self, lib.pp_return_path_free, self.struct)
        """Frees the lock, at the latest with the last reference. Nobody may be inside a call any more."""

    def send(self, message: bytes) -> None:
        """Write one whole message. Raises OSError or Cancelled; the first failure stays."""
        result = lib.pp_return_path_send_raw(self.struct, message, len(message))
        check(result, "Unable to write to the return path")


class Heard(enum.Enum):
    """Why `PageReceiver.listen` has returned."""

    END = int(lib.PP_LISTEN_END)
    """The stream has ended as it should."""
    LOST = int(lib.PP_LISTEN_LOST)
    """The channel has ended in the middle of something."""
    COMMAND = int(lib.PP_LISTEN_COMMAND)
    """A command stands in the reader, to be read and obeyed."""
    KICKED = int(lib.PP_LISTEN_KICKED)
    """The kick descriptor became readable."""


class PageReceiver:
    """Receives pages of `blocks` from `reader`: `load` before LISTEN, `listen` from then on."""

    def __init__(self, blocks: Sequence[RAMBlock], reader: StreamReader) -> None:
        self.blocks = PumpBlocks(blocks, DESTINATION_MAPS)
        self._reader = reader
        self._samples = ffi.new("uint32_t[]", lib.PP_SAMPLES)
        self.struct = ffi.new("struct pp_destination *")
        self.struct.blocks = self.blocks.array
        self.struct.block_count = len(blocks)
        self.struct.reader = reader.struct
        self.struct.uffd = -1
        self.struct.kick_fd = -1
        self.struct.last_block = -1
        self._staging = ffi.new("uint8_t[]", lib.PP_RUN * lib.PP_PAGE_SIZE)
        self.struct.staging = self._staging
        self.struct.samples = self._samples

    @property
    def received(self) -> Mapping[str, Bitmap]:
        """The received map of each block."""
        return self.blocks.maps["received"]

    @property
    def requested(self) -> Mapping[str, Bitmap]:
        """The requested map of each block."""
        return self.blocks.maps["requested"]

    def missing(self) -> dict[str, int]:
        """Pages not received, by block; blocks that are complete are left out."""
        counts = {b.name: b.page_count - self.received[b.name].count() for b in self.blocks.blocks}
        return {name: count for name, count in counts.items() if count}

    def missing_counts(self) -> dict[str, int]:
        """Pages not received, and those among them that somebody waits for; for a user."""
        waited_for = 0
        for name, requested in self.requested.items():
            wanted = requested.copy()
            wanted.andnot(self.received[name])
            waited_for += wanted.count()
        return {"pages": sum(self.missing().values()), "waited-for": waited_for}

    def waited_page(self) -> tuple[str, int] | None:
        """The first page that somebody waits for: its RAMBlock and number."""
        for name, requested in self.requested.items():
            page = requested.find_next_set()
            while page is not None and self.received[name].test(page):
                page = requested.find_next_set(page + 1)
            if page is not None:
                return name, page
        return None

    def load(self, *, ahead: bool = True) -> None:
        """Take page records up to the end of this section's body.

        `ahead`: nobody else places pages meanwhile, so that those of a run can be read to their places.

        Raises:
            StreamError: a record is malformed, or the stream ended.
            OSError, Cancelled: the channel failed, or the migration was cancelled.
        """
        self._check(lib.pp_destination_load(self.struct, int(ahead)))

    @property
    def has_checksums(self) -> bool:
        """Must every page have a checksum?"""
        return bool(self.struct.checks)

    def expect_checksums(self) -> None:
        """From now on every page must have a checksum, and is placed only if that is right."""
        self.struct.checks = RamFlag.CHECKSUM

    def discard(self, block: str, first_page: int, page_count: int) -> None:
        """Make pages missing again: they are out of date. Raises IndexError outside the block, OSError."""
        self.received[block]._check(first_page, page_count)
        index = self.blocks.index(block)
        self._check(lib.pp_destination_discard(self.struct, index, first_page, page_count))

    def new_channel(self, reader: StreamReader) -> None:
        """Go on over another channel, between records; until `ask_again` faults are only noted."""
        self._reader = reader
        self.struct.reader = reader.struct
        self.struct.last_block = -1
        self.struct.stage = self.struct.ending = 0
        self.struct.main_ended = 0
        self.struct.quiet = 1

    def no_channel(self) -> None:
        """The source is gone: from now on `listen` serves what needs none, and notes the rest."""
        self._reader.struct.fd = -1
        self.preempt_channel(None)
        self.struct.main_ended = 0
        self.struct.quiet = 1

    def preempt_channel(self, reader: StreamReader | None) -> None:
        """Take pages from a second channel, too, from the next `listen` on."""
        self._preempt = reader
        self.struct.preempt = ffi.NULL if reader is None else reader.struct
        self.struct.preempt_block = -1
        self.struct.preempt_ended = 0

    def ask_again(self, return_path: ReturnPathWriter) -> int:
        """Request every page that somebody waits for, and from now on each one at once; how many.

        Raises:
            OSError, Cancelled: as `ReturnPathWriter.send`.
        """
        self.struct.quiet = 0
        asked = 0
        for index, block in enumerate(self.blocks.blocks):
            wanted = self.requested[block.name].copy()
            wanted.andnot(self.received[block.name])
            for first, count in wanted.runs():
                result = lib.pp_return_path_request(
                    return_path.struct, self.struct.blocks, index, first, count
                )
                check(result, "Unable to write to the return path")
                asked += count
        return asked

    def listen(self, uffd: int, return_path: ReturnPathWriter, ram_section: int, kick_fd: int = -1) -> Heard:
        """Serve faults and the stream, until the stream, the channel or `kick_fd` ends it.

        May be called again: after COMMAND when that was read, else with `new_channel` or `no_channel`.

        Raises:
            StreamError: the source sent something that does not belong here.
            MigrationError: a page could not be placed.
            OSError, Cancelled: userfaultfd or the channel failed; the wait was cancelled.
        """
        self.struct.uffd = uffd
        self.struct.rp = return_path.struct
        self.struct.ram_section = ram_section
        self.struct.kick_fd = kick_fd
        result = lib.pp_destination_listen(self.struct)
        self._check(result)
        return Heard(int(result))

    def _check(self, result: int) -> None:
        raise_for_pump(int(result), self.struct.fault, "Unable to receive pages", self.blocks.names)

    def counters(self) -> dict[str, int]:
        """What has arrived so far; may be read while `listen` runs."""
        names = ("normal_pages", "zero_pages", "duplicates", "faults", "requests", "served_locally")
        return {name.replace("_", "-"): int(getattr(self.struct, name)) for name in names}

    def latency(self) -> FaultLatencies:
        """What the requested pages have cost so far; may be read while `listen` runs."""
        count = int(self.struct.latency_count)
        kept = min(count, int(lib.PP_SAMPLES))
        return FaultLatencies.of_sorted(
            sorted(ffi.unpack(self._samples, kept)) if kept else (),
            count,
            int(self.struct.latency_sum_ns),
            int(self.struct.latency_max_ns),
            tuple(ffi.unpack(self.struct.latency_buckets, 24)),
        )

    def blocktime(self) -> Blocktime:
        """How long the vCPU and others have waited; may be read while `listen` runs."""
        pump = self.struct
        return Blocktime(
            int(pump.vcpu_blocked_ns),
            int(pump.latency_count),
            int(pump.latency_sum_ns),
            int(pump.vcpu_latency_count),
            int(pump.vcpu_latency_sum_ns),
            tuple(ffi.unpack(pump.latency_buckets, 24)),
        )
