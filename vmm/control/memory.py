"""Handlers of schema/memory.json: guest RAM for those who check it.

RAM is read in pieces, with the loop free between them, and only where it has been received: a page that is
still at a migration source gives an error, never a wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any

from qmp.dispatcher import Call, Handler
from qmp.fdsets import FdSets
from vmm.control.interfaces import RamBlockView, RamControl
from vmm.errors import MachineError

__all__ = ["handlers"]

PIECE_BYTES = 256 << 10
"""Arbitrary: a tenth of a millisecond's work."""

PAGE_BYTES = 4096


def handlers(ram: RamControl, fdsets: FdSets) -> dict[str, Handler]:
    """Command name -> handler."""

    async def pmemsave(call: Call) -> None:
        address, left = call.arguments["val"], call.arguments["size"]
        path = call.arguments["filename"]
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            fd = os.open(fdsets.resolve(path, flags), flags, 0o666)
        except OSError as error:
            raise MachineError(f"Could not open '{path}': {error.strerror}") from error
        with open(fd, "wb", buffering=0) as file:
            while left > 0:
                piece = ram.read(address, min(left, PIECE_BYTES))
                try:
                    file.write(piece)
                except OSError as error:
                    raise MachineError(f"Could not write to '{path}': {error.strerror}") from error
                address += len(piece)
                left -= len(piece)
                await asyncio.sleep(0)

    async def digests(call: Call) -> list[dict[str, Any]]:
        return [{"name": block.name, "sha256": await _digest(block)} for block in ram.blocks]

    return {"pmemsave": pmemsave, "x-query-ram-digest": digests}


async def _digest(block: RamBlockView) -> str:
    """Of the pages that are not zero, each with its number in front: untouched RAM costs next to nothing."""
    digest = hashlib.sha256()
    for start in range(0, block.length_bytes, PIECE_BYTES):
        length = min(PIECE_BYTES, block.length_bytes - start)
        if not block.is_zero(start, length):
            for offset in range(start, start + length, PAGE_BYTES):
                if not block.is_zero(offset, PAGE_BYTES):
                    digest.update((offset // PAGE_BYTES).to_bytes(8, "big"))
                    digest.update(block.read(offset, PAGE_BYTES))
        await asyncio.sleep(0)
    return digest.hexdigest()
