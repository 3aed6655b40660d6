"""What a hostile destination may say through the return path: nothing malformed, nothing unasked."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled, IllegalRecord, PeerClosed, PeerError, PeerReported, StreamError
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.peer import ANSWER_MAGIC, HELLO_MAGIC, Fate
from vmm.migration.return_path import (
    FateReply,
    Loaded,
    Message,
    MessageWriter,
    Pong,
    RecvBitmapReply,
    ResumeAck,
    Shut,
    Started,
)
from vmm.migration.source_return import ReturnPathThread
from vmm.ram import RAMBlock

PAGES = 70
MAP = b"\xff" * 8 + b"\x3f" + bytes(7)


@dataclass
class Ends:
    thread: ReturnPathThread
    peer: socket.socket
    cancel: CancelEvent

    def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            self.peer.sendall(message if isinstance(message, bytes) else MessageWriter().write(message))


@pytest.fixture
def ends() -> Iterator[Ends]:
    block = RAMBlock("ram", PAGES * 4096)
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    cancel = CancelEvent()
    sender = PageSender([block], StreamWriter(ours.fileno(), cancel.fd))
    thread = ReturnPathThread(sender, StreamReader(ours.fileno(), cancel.fd), lambda: None)
    thread.start()
    yield Ends(thread, peer, cancel)
    cancel.set()
    thread.join()
    ours.close()
    peer.close()
    block.close()


def test_the_handshake(ends: Ends) -> None:
    thread, fd = ends.thread, ends.cancel.fd
    thread.expect("ram", FateReply, ResumeAck)
    ends.say(FateReply(Fate.STARTED), RecvBitmapReply("ram", MAP), ResumeAck())
    assert thread.wait_fate(fd) is Fate.STARTED
    assert thread.wait_bitmaps(["ram"], fd) == {"ram": MAP}
    thread.wait_resume_ack(fd)
    assert thread.destination_has_started
    ends.say(Shut(0))
    thread.wait_shut(fd)


def test_a_map_in_pieces(ends: Ends) -> None:
    """Byte by byte: its length is not that of the message."""
    ends.thread.expect("ram")
    for byte in MessageWriter().write(RecvBitmapReply("ram", MAP)):
        ends.say(bytes([byte]))
    assert ends.thread.wait_bitmaps(["ram"], ends.cancel.fd) == {"ram": MAP}


def raw_map(
    name: bytes = b"ram", size: int = 16, bits: bytes = MAP, ending: int = 0x0123456789ABCDEF
) -> bytes:
    head = b"\0\x05" + (len(name) + 1).to_bytes(2, "big") + bytes([len(name)]) + name
    return head + size.to_bytes(8, "big") + bits + ending.to_bytes(8, "big")


LIES: dict[str, tuple[Message | bytes, ...]] = {
    "a map that nobody asked for": (RecvBitmapReply("ram", MAP),) * 2,
    "a block that there is not": (raw_map(b"rom"),),
    "a short map": (raw_map(size=8, bits=MAP[:8]),),
    "a long map": (raw_map(size=24, bits=MAP + bytes(8)),),
    "a map without end": (raw_map(size=1 << 60),),
    "pages behind the last": (raw_map(bits=b"\xff" * 16),),
    "another ending": (raw_map(ending=0x0123456789ABCDEE),),
    "an early RESUME_ACK": (ResumeAck(),),
    "LOADED in a recovery": (Loaded(),),
    "STARTED in a recovery": (Started(),),
    "a fate that was not asked for": (FateReply(Fate.NOT_STARTED),),
    "a fate that there is not": (b"\x50\x03\0\x04\0\0\0\x09",),
    "a message that there is not": (b"\x50\x04\0\0",),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(ends: Ends, lie: str) -> None:
    ends.thread.expect("ram")
    ends.say(*LIES[lie])
    with pytest.raises(StreamError):
        ends.thread.wait_bitmaps(["ram", "nothing"], ends.cancel.fd)
    assert not ends.thread.destination_did_not_start


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (Shut(1), PeerReported),
        (Shut(0), PeerError),
        (None, PeerClosed),
        (b"\0\x01\0\x05" + bytes(5), IllegalRecord),
    ],
)
def test_what_ends_a_wait(ends: Ends, said: Message | bytes | None, error: type[Exception]) -> None:
    if said is None:
        ends.peer.close()
    else:
        ends.say(said)
    ends.thread.expect(ResumeAck)
    with pytest.raises(error):
        ends.thread.wait_resume_ack(ends.cancel.fd)


@pytest.mark.parametrize(
    ("said", "offset"),
    [(b"\x50\x04\0\0", 8), (b"\0\x01\0\x05" + bytes(5), 10), (b"\x50\x03\0\x04\0\0\0\x09", 12)],
)
def test_an_error_says_where(ends: Ends, said: bytes, offset: int) -> None:
    """Counted from the return path's first byte: a message's header, its length, its value."""
    ends.say(Pong(1), said)
    ends.thread.expect(FateReply)
    with pytest.raises(IllegalRecord, match=rf"\(at offset {offset}\)"):
        ends.thread.wait_resume_ack(ends.cancel.fd)


def test_a_wait_can_be_cancelled(ends: Ends) -> None:
    other = CancelEvent()
    other.set()
    with pytest.raises(Cancelled):
        ends.thread.wait_loaded(other.fd)


def test_introductions(ends: Ends) -> None:
    fd = ends.cancel.fd
    assert not ends.thread.wait_introduced(fd, 0.01)
    ends.say(Pong(1), Pong(ANSWER_MAGIC), Pong(HELLO_MAGIC))
    assert ends.thread.wait_introduced(fd, 10)
    assert ends.thread.peer_is_pageferry


def test_stock_has_started_when_the_package_is_loaded(ends: Ends) -> None:
    """It has no word for it; behind PING 3 nothing is left in the package but RUN."""
    ends.say(Pong(1), Pong(HELLO_MAGIC))
    assert ends.thread.wait_introduced(ends.cancel.fd, 10)
    assert not ends.thread.destination_has_started
    ends.say(Pong(3), Shut(1))
    with contextlib.suppress(PeerReported):
        ends.thread.wait_shut(ends.cancel.fd)
    assert ends.thread.destination_has_started
    assert not ends.thread.destination_did_not_start, "stock's SHUT 1 is no promise"
