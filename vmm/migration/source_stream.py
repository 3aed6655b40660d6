"""What the source writes, phase by phase; when, is `source.py`'s business.

    begin()      header, configuration, [OPEN_RETURN_PATH, PING 1, PING hello], [ADVISE], ram START
    part()       one ram PART
    finish()     ram END, the device sections, EOF, vmdescription                        precopy
    package()    DISCARDs, PING 2, DISCARDs; PACKAGED { LISTEN, device sections, RUN }               postcopy
                 to stock with its PINGs 2, 3 and 4 around and in the package
    end()        ram END, EOF
    name() before the last pages, start() after all that a start needs      between two Pageferries
    ask(), ask_received(), resume()      first on the new channel of a recovery

Source: QEMU 7.2 migration/savevm.c (qemu_savevm_state_header ... qemu_savevm_send_packaged), migration.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.migration import commands
from vmm.migration.device_state import RAM_SECTION_ID, RAM_VERSION, DeviceState
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.peer import ALIVE_MAGIC, HELLO_MAGIC
from vmm.migration.ram_records import EndOfBody, MemSize, RamWriter
from vmm.migration.stream import (
    Configuration,
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
    VmDescription,
    encode,
)
from vmm.migration.wire import PING_BEFORE_PACKAGE, PING_PACKAGE_END

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vmm.migration.bitmap import Bitmap
    from vmm.migration.byte_stream import StreamWriter
    from vmm.ram import RAMBlock

__all__ = ["SourceStream"]

POSTCOPY_BATCH_PAGES = 32
"""A requested page waits for the batch under way at most: 128 KiB, which a socket with room takes at once."""


class SourceStream:
    """The records of one outgoing migration, written to `writer`. Used by mig/source alone.

    Every method raises OSError or Cancelled as `StreamWriter` does.
    """

    def __init__(
        self, blocks: Sequence[RAMBlock], writer: StreamWriter, sender: PageSender | None = None
    ) -> None:
        self._blocks = blocks
        self._writer = writer
        self.sender = sender or PageSender(blocks, writer)

    @property
    def total_bytes(self) -> int:
        """Bytes written so far."""
        return self._writer.total_bytes + self.sender.channel_bytes

    def limit_backlog(self, size_bytes: int) -> None:
        """See `StreamWriter.limit_backlog`."""
        self._writer.limit_backlog(size_bytes)

    def shorten_backlog(self, size_bytes: int) -> None:
        """Let less than now wait in the kernel, and wait until it does."""
        self._writer.limit_backlog(size_bytes)
        self._writer.wait_for_room()

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken so far."""
        return self._writer.written_bytes

    def _put(self, *records: bytes) -> None:
        for record in records:
            self._writer.write(record)

    def begin(self, configuration: Configuration, *, return_path: bool, advise: bool) -> None:
        """Everything before the first page."""
        self._put(encode(Header()), encode(configuration))
        if return_path:
            self._put(encode(commands.OpenReturnPath()), encode(commands.Ping(1)))
            self._put(encode(commands.Ping(HELLO_MAGIC)))
        if advise:
            self._put(encode(commands.PostcopyAdvise()))
        sizes = MemSize(tuple((block.name, block.length_bytes) for block in self._blocks))
        ram = RamWriter()
        self._put(encode(SectionStart(RAM_SECTION_ID, "ram", 0, RAM_VERSION)))
        self.sender.end_of_section()
        self._put(ram.write(sizes), ram.write(EndOfBody()), encode(SectionFooter(RAM_SECTION_ID)))
        self._writer.flush()

    def beat(self) -> None:
        """A sign of life, where nothing else is to be said."""
        self._put(encode(commands.Ping(ALIVE_MAGIC)))
        self._writer.flush()

    def part(self, send: Callable[[PageSender], None]) -> None:
        """One ram PART; `send` decides how many pages go into it."""
        self._put(encode(SectionPart(RAM_SECTION_ID)))
        send(self.sender)
        self._end_body()

    def _end_body(self) -> None:
        self.sender.end_of_section()
        self._put(RamWriter().write(EndOfBody()), encode(SectionFooter(RAM_SECTION_ID)))
        self._writer.flush()

    def last_pages(self) -> None:
        """ram END with every page that is still dirty."""
        self._put(encode(SectionEnd(RAM_SECTION_ID)))
        while self.sender.send(1 << 16) == 1 << 16:
            pass
        self._end_body()

    def devices(self, devices: DeviceState) -> None:
        """The device sections, precopy."""
        self._put(devices.save())
        self._writer.flush()

    def eof(self, description: VmDescription | None) -> None:
        """The record with which the guest is the destination's, and what may follow it."""
        self._put(encode(EndOfStream()))
        if description is not None:
            self._put(encode(description))
        self._writer.flush()

    def discard(self, stale: Mapping[str, Bitmap]) -> int:
        """Discard commands for every page that is not up to date; returns how many pages."""
        return sum(self.sender.discard(name, bitmap) for name, bitmap in stale.items())

    def ping_discarded(self) -> None:
        """The ping behind discards: its answer says that they were obeyed."""
        self._put(encode(commands.Ping(PING_BEFORE_PACKAGE)))
        self._writer.flush()

    def package(self, devices: DeviceState, *, pings: bool) -> bytes:
        """The package as one record, not written yet: to a stock peer its first byte is the hand-over.

        `pings`: as stock's, with a ping in it and one behind. Each answer wakes somebody here while the guest
        stands still, so a peer that says by itself what it has done is not asked.
        """
        parts = [
            encode(commands.PostcopyListen()),
            devices.save(),
            encode(commands.Ping(PING_PACKAGE_END)) if pings else b"",
            encode(commands.PostcopyRun()),
        ]
        return encode(commands.Packaged(b"".join(parts))) + (encode(commands.Ping(4)) if pings else b"")

    def send_package(self, package: bytes) -> None:
        """Write what `package` gave."""
        self._put(package)
        self._writer.flush()

    # ---- the hand-over between two Pageferries (peer.py) ----

    def checksum_pages(self) -> None:
        """From here on each page goes with its checksum."""
        self._put(encode(commands.PageChecksums()))
        self.sender.checksum_pages()

    def received(self, digest: int) -> None:
        """What the destination should have, after the discards."""
        self._put(encode(commands.Received(digest)))

    def name(self, migration: bytes) -> None:
        """From here on the destination starts the guest on `start` only."""
        self._put(encode(commands.HandOver(migration)))
        self._writer.flush()

    def start(self) -> None:
        """The guest is the destination's."""
        self._put(encode(commands.Start()))
        self._writer.flush()

    def ping(self, value: int) -> None:
        """Between two sections: the answer says that all before it was taken."""
        self._put(encode(commands.Ping(value)))
        self._writer.flush()

    def keep(self) -> None:
        """The guest stays here."""
        self._put(encode(commands.Keep()))
        self._writer.flush()

    # ---- recovery ----

    def new_channel(self, writer: StreamWriter) -> None:
        """Go on over another channel; nothing of the old one's buffer is sent."""
        self._writer = writer
        self.sender.new_channel(writer)

    def ask(self, migration: bytes) -> None:
        """What became of it?"""
        self._put(encode(commands.Ask(migration)))
        self._writer.flush()

    def ask_received(self, blocks: Iterable[str]) -> None:
        """The received map of each block, please."""
        self._put(*(encode(commands.RecvBitmap(block)) for block in blocks))
        self._writer.flush()

    def resume(self) -> None:
        """Pages follow."""
        self._put(encode(commands.PostcopyResume()))
        self._writer.flush()
