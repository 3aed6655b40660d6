"""Handlers of schema/memory.json: guest RAM for those who check it.

RAM is read in pieces, with the loop free between them, and only where it has been received: a page that is
still at a migration source gives an error, never a wait.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qmp.dispatcher import Call, Handler
from qmp.fdsets import FdSets
from vmm.control.interfaces import MachineControl, RamBlockView
from vmm.errors import MachineError

__all__ = ["handlers", "save_physical", "save_virtual"]

PIECE_BYTES = 256 << 10
"""Arbitrary: a tenth of a millisecond's work."""

PAGE_BYTES = 4096
HUMAN_BYTES = 16 << 20
"""Arbitrary: some 10 ms."""
CPU_WAIT_S = 0.005
"""How long the page tables in use may be waited for. A CPU that waits for a page does not tell them."""


def handlers(machine: MachineControl, fdsets: FdSets) -> dict[str, Handler]:
    """Command name -> handler."""
    ram = machine.ram

    async def save(path: str, pieces: Iterable[tuple[int, int]]) -> None:
        with _create(fdsets.resolve, path) as file:
            for address, length in pieces:
                _write(file, path, ram.read(address, length))
                await asyncio.sleep(0)

    async def pmemsave(call: Call) -> None:
        address, size = call.arguments["val"], call.arguments["size"]
        await save(call.arguments["filename"], _cut(address, size))

    async def memsave(call: Call) -> None:
        if call.arguments.get("cpu-index", 0) != 0:
            raise MachineError("Parameter 'cpu-index' expects a CPU number")
        address, size = call.arguments["val"], call.arguments["size"]
        ranges = machine.virtual_ranges(address, size, CPU_WAIT_S)
        await save(call.arguments["filename"], (piece for each in ranges for piece in _cut(*each)))

    async def digests(call: Call) -> list[dict[str, Any]]:
        return [{"name": block.name, "sha256": await _digest(block)} for block in ram.blocks]

    return {"memsave": memsave, "pmemsave": pmemsave, "x-query-ram-digest": digests}


def save_physical(machine: MachineControl, address: int, size: int, filename: str) -> None:
    """`pmemsave` of the human monitor, which does nothing else meanwhile: up to HUMAN_BYTES."""
    _save_at_once(machine, [(address, size)], size, filename)


def save_virtual(machine: MachineControl, address: int, size: int, filename: str) -> None:
    """`memsave` likewise."""
    ranges = machine.virtual_ranges(address, size, CPU_WAIT_S) if size <= HUMAN_BYTES else []
    _save_at_once(machine, ranges, size, filename)


def _save_at_once(
    machine: MachineControl, ranges: Iterable[tuple[int, int]], size: int, filename: str
) -> None:
    if size > HUMAN_BYTES:
        raise MachineError(f"More than {HUMAN_BYTES} bytes at once are saved by QMP's command")
    with _create(lambda path, flags: path, filename) as file:
        for address, length in ranges:
            _write(file, filename, machine.ram.read(address, length))


def _create(resolve: Callable[[str, int], str], path: str) -> io.FileIO:
    """Raises MachineError. A pipe that nobody reads is an error, too, instead of a wait."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return open(os.open(resolve(path, flags), flags, 0o666), "wb", buffering=0)
    except OSError as error:
        raise MachineError(f"Could not open '{path}': {error.strerror}") from error


def _write(file: io.FileIO, path: str, data: bytes) -> None:
    try:
        written = file.write(data)
    except OSError as error:
        raise MachineError(f"Could not write to '{path}': {error.strerror}") from error
    if written != len(data):
        raise MachineError(f"Could not write to '{path}': nobody reads it")


def _cut(address: int, size: int) -> Iterator[tuple[int, int]]:
    """A range in pieces."""
    while size > 0:
        length = min(size, PIECE_BYTES)
        yield address, length
        address += length
        size -= length


async def _digest(block: RamBlockView) -> str:
    """Of the pages that are not zero, each with its number in front: untouched RAM costs next to nothing."""
    from hashlib import sha256  # here: it brings three megabytes of OpenSSL

    digest = sha256()
    for start in range(0, block.length_bytes, PIECE_BYTES):
        length = min(PIECE_BYTES, block.length_bytes - start)
        if not block.is_zero(start, length):
            for offset in range(start, start + length, PAGE_BYTES):
                if not block.is_zero(offset, PAGE_BYTES):
                    digest.update((offset // PAGE_BYTES).to_bytes(8, "big"))
                    digest.update(block.read(offset, PAGE_BYTES))
        await asyncio.sleep(0)
    return digest.hexdigest()
