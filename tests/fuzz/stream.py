"""Invariant: whatever stream comes, the loader takes it or refuses it by a named error, and can go on.

no exception but PageferryError, OSError and UffdError, each with a text; the machine can forget what came; no
more is read than the stream has. An input whose first byte is odd is a recipe: the bytes choose changes to
the records of a right stream (left out, twice, moved, altered, others between them)
"""

from __future__ import annotations

import functools
import os
from typing import Any

from tests.fuzz.arguments import Choices
from tests.support.cuts import Splitter
from tests.support.real_machines import PAGE, Side
from uffd import UffdError
from vmm.errors import PageferryError
from vmm.migration import commands, wire
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.device_state import RAM_SECTION_ID, RAM_VERSION, DeviceState
from vmm.migration.hand_over import Orders, StartOrder
from vmm.migration.kept import KeptState
from vmm.migration.loader import Loader
from vmm.migration.page_pump.receiver import PageReceiver, ReturnPathWriter
from vmm.migration.params import Capabilities
from vmm.migration.peer import HELLO_MAGIC
from vmm.migration.postcopy_state import PostcopyState, PostcopyStateMachine
from vmm.migration.ram_records import EndOfBody, MemSize, RamWriter, ZeroPage
from vmm.migration.stream import (
    Configuration,
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionStart,
    encode,
)

PAGES = 96
STRANGE = (0, 1, 0x7F, 0xFF, 0x100, 0xFFF, 0x1000, 2**31 - 1, 2**31, 2**32 - 1)


@functools.cache
def machine() -> Side:
    """A real one, that never runs; the same for all inputs."""
    return Side(None, memory=PAGES * PAGE, incoming=True)


@functools.cache
def streams() -> tuple[bytes, bytes]:
    """A right precopy and a right postcopy stream of this machine."""
    block = machine().machine.ram.blocks[0].name
    devices = DeviceState(machine().machine.sections(), KeptState()).save()
    ram = RamWriter()
    head = [encode(Header()), encode(Configuration(machine().machine.machine_type_name))]
    head += [
        encode(each) for each in (commands.OpenReturnPath(), commands.Ping(1), commands.Ping(HELLO_MAGIC))
    ]
    start = [encode(SectionStart(RAM_SECTION_ID, "ram", 0, RAM_VERSION))]
    start += [ram.write(MemSize(((block, PAGES * PAGE),))), ram.write(EndOfBody())]
    footer = encode(SectionFooter(RAM_SECTION_ID))
    pages = [ram.write(ZeroPage(block, page * PAGE)) for page in range(0, PAGES, 3)]
    end = [encode(SectionEnd(RAM_SECTION_ID)), *pages, ram.write(EndOfBody()), footer]
    precopy = [*head, *start, footer, *end, devices, encode(EndOfStream())]
    package = [encode(commands.PostcopyListen()), devices, encode(commands.PostcopyRun())]
    discard = commands.PostcopyRamDiscard(block, ((0, PAGE), (5 * PAGE, 9 * PAGE)))
    postcopy = [*head, encode(commands.PostcopyAdvise()), *start, footer, encode(discard)]
    postcopy.append(encode(commands.Packaged(b"".join(package))))
    return b"".join(precopy), b"".join(postcopy)


class Host:
    """Fits `LoaderHost`; LISTEN sensitises nothing here."""

    def __init__(self) -> None:
        self._cancel = CancelEvent()
        self._nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._orders = Orders()

    def open_return_path(self) -> ReturnPathWriter:
        return ReturnPathWriter(self._nowhere, self._cancel.fd)

    def arm(self, loader: Loader) -> None:
        assert loader.return_path is not None
        assert loader.order is not None

    def listen(self, loader: Loader) -> None:
        assert loader.return_path is not None or loader.order is None

    def end_of_section(self, receiver: PageReceiver) -> None:
        """There are no other channels."""

    def name(self, migration: bytes) -> StartOrder:
        return self._orders.new(migration)

    def close(self) -> None:
        os.close(self._nowhere)


def check(data: bytes) -> None:
    """One input: a stream, or a recipe for one."""
    if data[:1] and data[0] & 1:
        data = by_recipe(Choices(data[1:]))
    vm, host, kept = machine().machine, Host(), KeptState()
    capabilities = Capabilities(lambda: None)
    capabilities.set_one("postcopy-ram", True)
    descriptor = os.memfd_create("stream")
    try:
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        cancel = CancelEvent()
        reader = StreamReader(descriptor, cancel.fd)
        postcopy = PostcopyStateMachine()
        loader = Loader(vm, reader, capabilities, postcopy, host, kept)
        try:
            loader.run()
            refused = None
        except (PageferryError, OSError, UffdError) as error:
            refused = error
        assert refused is None or str(refused), f"an error without a text: {refused!r}"
        assert reader.offset <= len(data)
        assert postcopy.state in PostcopyState
    finally:
        os.close(descriptor)
        host.close()
        vm.forget_incoming_state()
        vm.ram.blocks[0].discard_all()
        kept.forget()


def by_recipe(choices: Choices) -> bytes:
    """A right stream, taken apart, changed and put together."""
    right = streams()[choices.below(2)]
    splitter = Splitter()
    splitter.feed(right)
    ends = [0, *splitter.ends]
    records = [right[ends[n] : ends[n + 1]] for n in range(len(ends) - 1)]
    for _ in range(1 + choices.below(6)):
        if not records:
            break
        at = choices.below(len(records))
        match choices.below(8):
            case 0:
                del records[at]
            case 1:
                records.insert(at, records[at])
            case 2:
                records.insert(choices.below(len(records)), records.pop(at))
            case 3:
                records.insert(at, a_command(choices))
            case 4:
                del records[at + 1 :]
            case _:
                records[at] = altered(records[at], choices)
    return b"".join(records)


def altered(record: bytes, choices: Choices) -> bytes:
    """One number in it is another one, most likely in its first bytes."""
    size = (1, 2, 4, 8)[choices.below(4)]
    at = choices.below(min(len(record), 24) if choices.below(4) else len(record))
    number = STRANGE[choices.below(len(STRANGE))] if choices.below(2) else choices.below(256)
    return record[:at] + (number % (1 << 8 * size)).to_bytes(size, "big") + record[at + size :]


def a_command(choices: Choices) -> bytes:
    """Any command, with a payload of a length that it has, or another."""
    known: dict[int, Any] = {int(each): wire.COMMAND_LENGTHS.get(each) for each in wire.Command}
    number = choices.of([*known, 0, 0xFFFF])
    length = choices.of([*(known.get(number) or (0, 4, 16)), choices.below(300)])
    payload = bytes(choices.below(256) for _ in range(length))
    head = wire.U8.pack(wire.RecordType.COMMAND) + wire.COMMAND_HEADER.pack(number, length)
    return head + payload


SEEDS = [*streams(), *(b"\1" + number.to_bytes(4, "little") * 4 for number in range(48))]
TOKENS = [
    b"QEVM\0\0\0\3",
    b"\x7e\0\0\0\2",
    b"\x03ram\0\0\0\0\0\0\0\4",
    *(
        b"\x08" + wire.COMMAND_HEADER.pack(each, (wire.COMMAND_LENGTHS.get(each) or (0,))[0])
        for each in wire.Command
    ),
    wire.U64.pack(wire.RamFlag.EOS),
    wire.U64.pack(wire.RamFlag.ZERO | wire.RamFlag.CONTINUE),
    wire.U64.pack(wire.RamFlag.PAGE | 0x1000),
]
