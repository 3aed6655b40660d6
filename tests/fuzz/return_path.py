"""Invariant: whatever a destination says on the return path, mig/return ends with a named error or with SHUT.

no exception but those that it keeps for mig/source; every page request lies inside a RAMBlock; the reader of
messages in Python, which tests and tools use, refuses by name what it does not take
"""

from __future__ import annotations

import functools
import os

from vmm.errors import PageferryError
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.peer import ANSWER_MAGIC, HELLO_MAGIC, Fate
from vmm.migration.return_path import (
    FateReply,
    Loaded,
    Message,
    MessageReader,
    MessageWriter,
    Pong,
    RecvBitmapReply,
    ReqPages,
    ResumeAck,
    Shut,
    Started,
    bitmap_size_bytes,
)
from vmm.migration.source_return import ReturnPathThread
from vmm.ram import RAMBlock
from vmm.vmstate import BytesSource

PAGE = 4096
LENGTHS = {"ram": 70, "rom": 3}


@functools.cache
def blocks() -> tuple[RAMBlock, ...]:
    """The same for all inputs."""
    return tuple(RAMBlock(name, pages * PAGE) for name, pages in LENGTHS.items())


def check(data: bytes) -> None:
    """One input: what comes back from a destination, up to its end; the first byte: from a Pageferry?"""
    descriptor, cancel = os.memfd_create("return path"), CancelEvent()
    try:
        os.write(descriptor, data[1:])
        os.lseek(descriptor, 0, os.SEEK_SET)
        reader = StreamReader(descriptor, cancel.fd)
        sender = PageSender(blocks(), StreamWriter(-1, cancel.fd))
        broken: list[bool] = []
        thread = ReturnPathThread(sender, reader, lambda: broken.append(True))
        thread.peer_is_pageferry = bool(data[:1] and data[0] & 1)
        if data[:1] and data[0] & 2:
            thread.expect(FateReply, Loaded, ResumeAck, Started, *LENGTHS)
        thread._main()  # on this thread: it ends with the input
        error = thread._error
        assert error is None or str(error), f"an error without a text: {error!r}"
        assert error is None or isinstance(error, PageferryError | OSError)
        assert thread._shut is not None or error is not None
        for block in blocks():
            queued = sender.blocks.maps["queued"][block.name]
            assert queued.count() <= LENGTHS[block.name]
    finally:
        os.close(descriptor)
    read_in_python(data[1:])


def read_in_python(data: bytes) -> None:
    """The reader that tests and tools use, on the same bytes."""
    source, messages = BytesSource(data), MessageReader(LENGTHS)
    while source.peek(1):
        try:
            messages.read(source)
        except PageferryError:
            return


def written(*messages: Message) -> bytes:
    """The bytes of these, on one channel."""
    writer = MessageWriter()
    return b"".join(writer.write(message) for message in messages)


def bitmap(name: str) -> RecvBitmapReply:
    return RecvBitmapReply(name, b"\x5a" * bitmap_size_bytes(LENGTHS[name]))


SEEDS = [
    b"\1" + written(Pong(1), Pong(HELLO_MAGIC), Pong(ANSWER_MAGIC), Loaded(), Started(), Shut(0)),
    b"\3"
    + written(ReqPages("ram", 0, PAGE), ReqPages("ram", PAGE, 3 * PAGE), ReqPages("rom", 0, PAGE), Shut(1)),
    b"\3" + written(FateReply(Fate.STARTED), bitmap("ram"), bitmap("rom"), ResumeAck()),
    b"\0" + written(Pong(1), Pong(2), Pong(3), ReqPages("rom", 2 * PAGE, PAGE), Shut(0)),
]
TOKENS = [
    *(written(message) for message in (Shut(0), Pong(HELLO_MAGIC), ResumeAck(), Loaded(), bitmap("rom"))),
    b"\0\3\0\x11",
    b"\0\4\0\x0c",
    b"\3ram",
    (69 * PAGE).to_bytes(8, "big"),
    PAGE.to_bytes(4, "big"),
]
