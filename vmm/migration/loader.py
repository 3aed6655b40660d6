"""Reads one migration stream into the machine: what mig/load does, from the header to the end or to RUN.

    header | configuration | OPEN_RETURN_PATH, PING 1 | [ADVISE] | ram START
           | ram PART ... | ram END | FULL sections | EOF | vmdescription                     precopy
           | [DISCARD ...] | PING 2 | PACKAGED { LISTEN | FULL sections | PING 3 | RUN }      postcopy
             and the rest of the stream belongs to mig/listen, from LISTEN on

A Pageferry source names its migration (X_HAND_OVER) before the last pages: then neither EOF nor RUN starts
the guest, but its order after it (`await_start`, `hand_over.py`).

Nothing in the stream is trusted: every name, number and length is checked against this machine before
anything is touched, and any failure leaves by one exception (`errors.py`) with the place in it.

Source: QEMU 7.2 migration/savevm.c (qemu_loadvm_state, loadvm_process_command).
"""

from __future__ import annotations

import enum
import logging
from typing import TYPE_CHECKING, Protocol

import uffd
from vmm.migration import commands, wire
from vmm.migration.device_state import RAM_SECTION_ID, DeviceState
from vmm.migration.errors import IllegalRecord, MigrationError, PeerError, StreamMismatch
from vmm.migration.page_pump.checksums import digest
from vmm.migration.page_pump.receiver import PageReceiver, ReturnPathWriter
from vmm.migration.params import Capabilities, Capability
from vmm.migration.peer import ANSWER_MAGIC, HELLO_MAGIC
from vmm.migration.postcopy_state import PostcopyEvent, PostcopyState
from vmm.migration.ram_records import EndOfBody, MemSize, RamReader
from vmm.migration.return_path import Loaded, MessageWriter, Pong
from vmm.migration.stream import (
    Configuration,
    EndOfStream,
    Record,
    SectionEnd,
    SectionFull,
    SectionPart,
    SectionStart,
    read_footer,
    read_header,
    read_record,
    read_vmdescription,
)
from vmm.vmstate import BytesSource

if TYPE_CHECKING:
    from vmm.migration.byte_stream import StreamReader
    from vmm.migration.guest import MigratableMachine
    from vmm.migration.hand_over import StartOrder
    from vmm.migration.kept import KeptState
    from vmm.migration.postcopy_state import PostcopyStateMachine
    from vmm.vmstate import ByteSource

__all__ = ["Loader", "LoaderHost", "Outcome"]

log = logging.getLogger(__name__)


class Outcome(enum.Enum):
    """How a stream's loading ended, errors aside."""

    COMPLETE = "the whole guest is here"
    RUNNING = "RUN came: the guest can start, mig/listen receives the rest"


class LoaderHost(Protocol):
    """Who loads: the destination, which owns the return path's descriptor and the listen thread."""

    def open_return_path(self) -> ReturnPathWriter:
        """The return path; raises PeerError if the transport is one-way."""

    def arm(self, loader: Loader) -> None:
        """Sensitise the RAM: LISTEN follows, and nothing is placed before it."""

    def listen(self, loader: Loader) -> None:
        """Start mig/listen on the loader's reader; sensitise the RAM, unless it is."""

    def end_of_section(self, receiver: PageReceiver) -> None:
        """A ram section's EOS was read: what other channels have brought for it is waited for."""

    def name(self, migration: bytes) -> StartOrder:
        """The source names its migration; raises MigrationError if that was here before."""


class Loader:
    """One attempt to load a guest from `reader`."""

    def __init__(
        self,
        machine: MigratableMachine,
        reader: StreamReader,
        capabilities: Capabilities,
        postcopy: PostcopyStateMachine,
        host: LoaderHost,
        kept: KeptState,
    ) -> None:
        self.reader = reader
        self.blocks = tuple(machine.ram.blocks)
        self.receiver = PageReceiver(self.blocks, reader)
        self.return_path: ReturnPathWriter | None = None
        self.ram_section_id = RAM_SECTION_ID
        self.peer_is_pageferry = False
        self.migration: bytes | None = None
        """Its name, if the source gave it one."""
        self.order: StartOrder | None = None
        """Who may start the guest; None: whoever has the whole stream, or RUN."""
        self._machine = machine
        self._capabilities = capabilities
        self._postcopy = postcopy
        self._host = host
        self._kept = kept
        self._messages = MessageWriter()
        self._devices = DeviceState(machine.sections(), kept)
        self._devices.prepare()
        self._table = self._devices.table()
        self._ram_started = False
        self._is_armed = False

    def run(self) -> Outcome:
        """Load up to the end of the stream, or up to RUN.

        Raises:
            StreamError, VMStateError: the stream is malformed, truncated, or for another machine.
            MigrationError: the source broke the protocol, or this host cannot do what it asks.
            OSError, Cancelled: the channel failed, or the attempt was given up.
        """
        read_header(self.reader)
        if self.reader.peek(1) == bytes([wire.RecordType.CONFIGURATION]):
            self._check_configuration(read_record(self.reader))
        outcome = self._read_records(self.reader)
        if outcome is Outcome.COMPLETE:
            read_vmdescription(self.reader)
        return outcome

    def await_start(self, outcome: Outcome) -> None:
        """Everything is here: wait until the source hands the guest over, if it does so in words.

        Raises:
            PeerError: it keeps the guest.
            StreamError, OSError, Cancelled: the channel broke before it has said so.
        """
        if self.order is None:
            return
        assert self.return_path is not None, "a source without a return path cannot know us"
        try:
            self.return_path.send(self._messages.write(Loaded()))
        except OSError as error:
            if self.order.withdraw(error):
                raise
        if outcome is Outcome.COMPLETE:
            self.obey_order(read_record(self.reader))
        self.order.wait()
        if outcome is Outcome.RUNNING:
            self._postcopy.handle(PostcopyEvent.RUN)

    def obey_order(self, record: Record) -> None:
        """What comes after the device state: the order to start, or its withdrawal. (who reads the stream)

        Raises:
            PeerError: the source keeps the guest, or it is another record.
        """
        match record:
            case commands.Start() if self.order is not None:
                if not self.order.give():
                    raise PeerError("START came after the guest was given up here")
            case commands.Keep() if self.order is not None:
                raise PeerError("The source keeps the guest")
            case _:
                raise PeerError(f"{type(record).__name__} cannot be obeyed here")

    def _read_records(self, source: ByteSource) -> Outcome:
        while True:
            offset = source.offset
            record = read_record(source)
            if self._is_armed and source is self.reader and not isinstance(record, commands.CommandRecord):
                # Whoever touched a missing page now would wait for one that nobody serves yet.
                got = type(record).__name__
                raise IllegalRecord("Before the package", offset=offset, expected="a command", got=got)
            match record:
                case SectionStart():
                    self._table.introduce(record, offset)
                    self._start_ram(record, source)
                case SectionFull():
                    self._table.introduce(record, offset)
                    self._devices.load(record, source)
                case SectionPart() | SectionEnd():
                    self._table.find(record, offset)
                    self._load_pages(record, source)
                case commands.CommandRecord():
                    outcome = self._obey(record, source)
                    if outcome is not None:
                        return outcome
                case EndOfStream():
                    if source is not self.reader:
                        raise IllegalRecord("End of package", offset=offset, expected="RUN", got="EOF")
                    return Outcome.COMPLETE
                case _:
                    name = type(record).__name__
                    raise IllegalRecord("record type", offset=offset, expected="a section", got=name)

    def _check_configuration(self, record: Record) -> None:
        assert isinstance(record, Configuration)
        # QEMU compares as many bytes as it received, so a prefix of our name passes there.
        name = self._machine.machine_type_name
        if record.machine != name:
            raise StreamMismatch(
                "Machine type of the source", expected=f"'{name}'", got=f"'{record.machine}'"
            )
        # Only x-ignore-shared is ever in the list of a 7.2 source, and we do not have it.
        for capability in record.capabilities or ():
            raise StreamMismatch(f"Capability {capability}", expected="off", got="on at the source")
        ours = self._machine.config.uuid
        if record.uuid is not None and ours is not None and record.uuid != ours.bytes:
            raise StreamMismatch("UUID of the source", expected=str(ours), got=record.uuid.hex())

    # ---- RAM ----

    def _start_ram(self, record: SectionStart, source: ByteSource) -> None:
        if record.idstr != "ram" or source is not self.reader or self._ram_started:
            raise IllegalRecord("SECTION_START", expected="ram, once", got=record.idstr)
        ours = {block.name: block.length_bytes for block in self.blocks}
        ram = RamReader(source, ours)
        sizes = ram.read()
        if not isinstance(sizes, MemSize):
            raise IllegalRecord("ram setup", offset=source.offset, expected="MEM_SIZE", got=str(sizes)[:60])
        self._check_sizes(dict(sizes.blocks), ours)
        if not isinstance(ram.read(), EndOfBody):
            raise IllegalRecord("ram setup", offset=source.offset, expected="EOS", got="another page record")
        self._host.end_of_section(self.receiver)
        read_footer(source, record.section_id, "ram")
        self.ram_section_id = record.section_id
        self._ram_started = True

    def _check_sizes(self, theirs: dict[str, int], ours: dict[str, int]) -> None:
        for name, length in ours.items():
            if theirs.get(name, length) != length:
                raise StreamMismatch(
                    f"Length mismatch of RAMBlock '{name}'", expected=hex(length), got=hex(theirs[name])
                )
        absent = ours.keys() - theirs.keys()
        if absent:
            raise StreamMismatch("RAMBlocks of the source", expected=", ".join(ours), got=", ".join(theirs))
        self._kept.admit({name: length for name, length in theirs.items() if name not in ours})
        if self._kept.blocks:
            self.blocks = (*self.blocks, *self._kept.blocks)
            self.receiver = PageReceiver(self.blocks, self.reader)

    def _load_pages(self, record: SectionPart | SectionEnd, source: ByteSource) -> None:
        if source is not self.reader or not self._ram_started:
            raise IllegalRecord("ram section", expected="in the main stream, after its START", got="here")
        self.receiver.load(ahead=not self._capabilities[Capability.MULTIFD])
        self._host.end_of_section(self.receiver)
        read_footer(source, record.section_id, "ram")

    # ---- commands ----

    def _obey(self, command: commands.CommandRecord, source: ByteSource) -> Outcome | None:
        log.debug("command %s at offset %d", command.name, source.offset)
        match command:
            case commands.OpenReturnPath():
                if self.return_path is not None:
                    raise PeerError("OPEN_RETURN_PATH came twice")
                self.return_path = self._host.open_return_path()
            case commands.Ping(value):
                if value == wire.PING_BEFORE_PACKAGE and source is self.reader:
                    self._arm()
                self._pong(value)
            case commands.PostcopyAdvise():
                self._advise(command)
            case commands.PostcopyRamDiscard(block, ranges):
                self._discard(block, ranges)
            case commands.Packaged(content):
                if source is not self.reader:
                    raise PeerError("PACKAGED inside a package")
                return self._read_package(content)
            case commands.PostcopyListen():
                if source is self.reader:
                    raise PeerError("POSTCOPY_LISTEN outside a package")
                self._postcopy.handle(PostcopyEvent.LISTEN)
                self._host.listen(self)
            case commands.PostcopyRun():
                if self.order is None:
                    self._postcopy.handle(PostcopyEvent.RUN)
                return Outcome.RUNNING
            case commands.PageChecksums():
                self._expect_checksums(source)
            case commands.Received(expected):
                self._confirm(expected)
            case commands.HandOver(migration):
                self._take_name(migration, source)
            case commands.SwitchoverStart():
                log.debug("a source of QEMU 10 says that switchover starts")
            case _:
                raise PeerError(f"{command.name} cannot be obeyed here")
        return None

    def _expect_checksums(self, source: ByteSource) -> None:
        if not self.peer_is_pageferry or not self._ram_started or source is not self.reader:
            raise PeerError(
                "X_PAGE_CHECKSUMS may come after the PING of a Pageferry and RAM's START, in no package"
            )
        self.receiver.expect_checksums()
        log.info("pages come with checksums")

    def _confirm(self, expected: int) -> None:
        """A damaged discard would leave a page here that is out of date."""
        got = digest(self.receiver.received)
        if got != expected:
            raise StreamMismatch(
                "Digest of the received pages", expected=f"{expected:#018x}", got=f"{got:#018x}"
            )

    def _take_name(self, migration: bytes, source: ByteSource) -> None:
        if not self.peer_is_pageferry or self.order is not None or source is not self.reader:
            raise PeerError("X_HAND_OVER may come once, after the PING of a Pageferry, and in no package")
        self.order = self._host.name(migration)
        self.migration = migration

    def _arm(self) -> None:
        """A Pageferry source is about to stop its guest and waits for the answer: now is the time."""
        is_discarding = self._postcopy.state in (PostcopyState.ADVISE, PostcopyState.DISCARD)
        if self.order is not None and is_discarding and not self._is_armed:
            self._is_armed = True
            self._host.arm(self)

    def _pong(self, value: int) -> None:
        if self.return_path is None:
            raise PeerError("PING before OPEN_RETURN_PATH")
        pongs = [self._messages.write(Pong(value))]
        if value == HELLO_MAGIC:
            # Only a Pageferry source sends this; it may now get messages that stock does not know. When its
            # own number comes back it looks whether it has got ours, so that goes first.
            self.peer_is_pageferry = True
            pongs.insert(0, self._messages.write(Pong(ANSWER_MAGIC)))
        try:
            self.return_path.send(b"".join(pongs))
        except OSError as error:
            if self._postcopy.state is not PostcopyState.LISTENING:
                raise
            # The package is here as a whole and the source has given the guest away: it must start here.
            # That the channel is lost is mig/listen's to notice.
            log.warning("no pong from inside the package: %s", error)

    def _advise(self, advise: commands.PostcopyAdvise) -> None:
        if not self._capabilities[Capability.POSTCOPY_RAM]:
            raise PeerError("RAM postcopy is disabled but have 16 byte advise")
        sizes = (advise.ram_page_sizes_bytes, advise.target_page_size_bytes)
        if sizes != (wire.PAGE_SIZE_BYTES, wire.PAGE_SIZE_BYTES):
            text = f"Postcopy needs matching RAM page sizes (s={sizes[0]} d={wire.PAGE_SIZE_BYTES})"
            raise StreamMismatch(text, expected=wire.PAGE_SIZE_BYTES, got=sizes)
        reason = uffd.probe().why_no_missing
        if reason is not None:
            raise MigrationError(f"Postcopy is not supported: {reason}")
        self._postcopy.handle(PostcopyEvent.ADVISE)

    def _discard(self, block: str, ranges: tuple[tuple[int, int], ...]) -> None:
        self._postcopy.handle(PostcopyEvent.DISCARD)
        maps = self.receiver.received
        if block not in maps:
            raise StreamMismatch("RAMBlock to discard", expected="one of " + ", ".join(maps), got=block)
        for start, length in ranges:
            first, count = start // wire.PAGE_SIZE_BYTES, length // wire.PAGE_SIZE_BYTES
            if (start | length) % wire.PAGE_SIZE_BYTES or first + count > maps[block].pages:
                got = f"{length:#x} bytes at {start:#x}"
                raise IllegalRecord("Range to discard", expected=f"pages of '{block}'", got=got)
            self.receiver.discard(block, first, count)

    def _read_package(self, content: bytes) -> Outcome:
        log.info("package of %d bytes", len(content))
        outcome = self._read_records(BytesSource(content))
        assert outcome is Outcome.RUNNING, "a package ends with RUN or with an error"
        return outcome
