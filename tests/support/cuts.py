"""Cuts a migration at a chosen record or byte, between two real machines in this process.

    source --socket--> CuttingRelay --socket--> destination      engine, threads and page pump are real
                          |
                          +-- counts records as they pass; passes what comes before the cut, then closes both

`Splitter` finds where records end in a stream that is still coming; `stream_walk` agrees with it, by test.
"""

from __future__ import annotations

import abc
import contextlib
import pathlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from vmm.migration import wire

__all__ = ["Cut", "CuttingRelay", "MessageSplitter", "Splitter"]

CHUNK_BYTES = 1 << 16
RAM_FLAGS = wire.RamFlag
NAMED = (wire.RecordType.SECTION_START, wire.RecordType.SECTION_FULL)


@dataclass(frozen=True)
class Cut:
    """Where a connection ends: before the record of this number, or behind so many bytes, one way."""

    connection: int
    """1 = the first."""
    forward: bool
    """The migration stream; else the return path."""
    records: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        where = f"record {self.records}" if self.bytes is None else f"byte {self.bytes}"
        return f"{self.connection}/{'forward' if self.forward else 'back'}/{where}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """What `str` makes of one."""
        connection, direction, where = text.split("/")
        unit, number = where.split()
        records, count = (int(number), None) if unit == "record" else (None, int(number))
        return cls(int(connection), direction == "forward", records, count)


class _Ends(abc.ABC):
    """Where something ends in bytes that are still coming."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0
        self.ends: list[int] = []
        """Offsets."""

    def feed(self, data: bytes) -> None:
        """More of it."""
        self._buffer += data
        while (length := self._next()) is not None and length <= len(self._buffer):
            del self._buffer[:length]
            self._start += length
            self.ends.append(self._start)

    @abc.abstractmethod
    def _next(self) -> int | None:
        """The length of what is at the start of the buffer, None if that is not known yet."""


class Splitter(_Ends):
    """Where the records of a migration stream end, as it comes. A package is taken apart, too."""

    def __init__(self, *, resumed: bool = False) -> None:
        """`resumed`: the stream of a recovery, which has no header."""
        super().__init__()
        self._in_ram = False
        self._expect_header = not resumed
        self._mem_size = 0

    def _next(self) -> int | None:
        if not self._buffer:
            return None
        if self._expect_header:
            self._expect_header = len(self._buffer) < wire.HEADER.size
            return wire.HEADER.size
        if self._mem_size:
            return self._block_size()
        return self._page() if self._in_ram else self._record()

    def _u(self, at: int, size: int) -> int | None:
        return int.from_bytes(self._buffer[at : at + size], "big") if len(self._buffer) >= at + size else None

    def _record(self) -> int | None:
        kind = self._buffer[0]
        match kind:
            case wire.RecordType.EOF:
                return 1
            case wire.RecordType.COMMAND:
                command, length = self._u(1, 2), self._u(3, 2)
                if length is None:
                    return None
                return 5 + length if command != wire.Command.PACKAGED else 9
            case wire.RecordType.CONFIGURATION:
                length = self._u(1, 4)
                return None if length is None else 5 + length
            case wire.RecordType.VMDESCRIPTION:
                length = self._u(1, 4)
                return None if length is None else 5 + length
            case wire.RecordType.SUBSECTION:  # of the configuration: nothing that needs to be cut apart
                return len(self._buffer)
            case wire.RecordType.SECTION_FOOTER:
                return 5
            case wire.RecordType.SECTION_PART | wire.RecordType.SECTION_END:
                return self._enter_ram(5)
            case _ if kind in NAMED:
                return self._named(kind)
            case _:
                raise AssertionError(f"record type {kind:#x} at {self._start}")

    def _enter_ram(self, length: int) -> int:
        if len(self._buffer) >= length:
            self._in_ram = True
        return length

    def _named(self, kind: int) -> int | None:
        name = self._u(5, 1)
        if name is None or len(self._buffer) < (head := 6 + name + 8):
            return None
        if kind == wire.RecordType.SECTION_START:
            return self._enter_ram(head)
        footer = bytes([wire.RecordType.SECTION_FOOTER]) + self._buffer[1:5]
        at = self._buffer.find(footer, head)
        return None if at < 0 else at

    def _page(self) -> int | None:
        word = self._u(0, 8)
        if word is None:
            return None
        flags = word & wire.RAM_FLAG_MASK
        if flags & RAM_FLAGS.EOS:
            self._in_ram = False
            return 8
        if flags & RAM_FLAGS.MEM_SIZE:
            self._mem_size = word & ~wire.RAM_FLAG_MASK
            return 8
        length = 8
        if not flags & RAM_FLAGS.CONTINUE:
            name = self._u(8, 1)
            if name is None:
                return None
            length += 1 + name
        length += wire.PAGE_CHECKSUM.size if flags & RAM_FLAGS.CHECKSUM else 0
        return length + (wire.PAGE_SIZE_BYTES if flags & RAM_FLAGS.PAGE else 1)

    def _block_size(self) -> int | None:
        name = self._u(0, 1)
        if name is None or (size := self._u(1 + name, 8)) is None:
            return None
        self._mem_size -= size
        return 9 + name


class MessageSplitter(_Ends):
    """Where the messages of a return path end."""

    def _next(self) -> int | None:
        head = wire.RETURN_PATH_HEADER.size
        if len(self._buffer) < head:
            return None
        kind, length = wire.RETURN_PATH_HEADER.unpack_from(self._buffer)
        if kind != wire.ReturnPathType.RECV_BITMAP:
            return int(head + length)
        at = head + length  # the bitmap stands outside of the length
        if len(self._buffer) < at + 8:
            return None
        size = int.from_bytes(self._buffer[at : at + 8], "big")
        return int(at + 8 + size + 8)


class CuttingRelay:
    """Listens at `path` and passes connection after connection on to `target`, both unix sockets."""

    def __init__(self, path: str, target: str, cuts: tuple[Cut, ...] = ()) -> None:
        self.path = path
        self.target = target
        self.sent: list[bytearray] = []
        """What has passed on each connection, from the source; `answered` from the destination."""
        self.answered: list[bytearray] = []
        self.done: list[Cut] = []
        """The cuts that were made."""
        self._cuts = cuts
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(4)
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="relay")]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                source, _ = self._listener.accept()
                destination = socket.socket(socket.AF_UNIX)
                self._ends += [source, destination]
                try:
                    destination.connect(self.target)
                except OSError:
                    source.shutdown(socket.SHUT_RDWR)
                    continue
                self._serve(source, destination)

    def _serve(self, source: socket.socket, destination: socket.socket) -> None:
        number = len(self.sent) + 1
        self.sent.append(bytearray())
        self.answered.append(bytearray())
        for forward, ends in ((True, (source, destination)), (False, (destination, source))):
            cut = next((c for c in self._cuts if (c.connection, c.forward) == (number, forward)), None)
            passed = (self.sent if forward else self.answered)[-1]
            thread = threading.Thread(target=self._pump, args=(*ends, cut, passed), name=f"relay {number}")
            self._threads.append(thread)
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, cut: Cut | None, passed: bytearray) -> None:
        with contextlib.suppress(OSError):
            for data in self._until_cut(source, cut):
                passed += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _until_cut(self, source: socket.socket, cut: Cut | None) -> Iterator[bytes]:
        splitter = None if cut is None else _splitter(cut)
        total = 0
        while True:
            if cut is not None and (end := _cut_at(cut, splitter)) is not None and end <= total:
                self._cut(cut)
                return
            data = source.recv(CHUNK_BYTES)
            if not data:
                return
            if splitter is not None and cut is not None:
                splitter.feed(data)
                end = _cut_at(cut, splitter)
                if end is not None and end <= total + len(data):
                    yield data[: end - total]
                    self._cut(cut)
                    return
            total += len(data)
            yield data

    def _cut(self, cut: Cut) -> None:
        self.done.append(cut)
        for end in self._ends[2 * cut.connection - 2 : 2 * cut.connection]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Break what stands and join the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "the relay did not end"
        for end in (self._listener, *self._ends):
            end.close()
        pathlib.Path(self.path).unlink(missing_ok=True)


def _splitter(cut: Cut) -> _Ends | None:
    if cut.records is None:
        return None
    return Splitter(resumed=cut.connection > 1) if cut.forward else MessageSplitter()


def _cut_at(cut: Cut, splitter: _Ends | None) -> int | None:
    """The offset of the cut, None if it is not known yet."""
    if cut.bytes is not None:
        return cut.bytes
    if cut.records == 0:
        return 0
    assert splitter is not None
    assert cut.records is not None
    return splitter.ends[cut.records - 1] if len(splitter.ends) >= cut.records else None
