"""The spool: what a source still owed when it was killed in postcopy, in a file that can be sent from.

    source --(fork after the hand-over)--> keeper      shares the RAM, costs page tables, copies nothing
      |  the destination has everything: a byte --> the keeper ends
      X  killed: the pipe ends                  --> the keeper writes the spool
                                                        |
    destination (postcopy-paused, migrate-recover) <--- pageferry-spool SPOOL URI

What it protects against: the death of the source's process, by whatever signal. What it does not: the death
of the host, of the keeper too (a kill of the whole cgroup), and a disk without room for what is owed: then
the keeper leaves nothing under the spool's name. A guest never runs from a spool; only pages come from it.

Layout: HEADER_BYTES of JSON, filled up with spaces, `{"pageferry-spool": 1, "migration": hex or null,
"blocks": [{"name", "pages", "owed_at", "pages_at"}]}`, offsets in bytes. At `owed_at` a little-endian bitmap
of the owed pages, at `pages_at` the RAMBlock, a hole where no page is owed. The file is sparse.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmm.errors import PageferryError
from vmm.migration.bitmap import Bitmap
from vmm.migration.page_pump.native import check, ffi, lib
from vmm.migration.wire import PAGE_SIZE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.ram import RAMBlock

__all__ = ["Keeper", "Spool", "SpoolBlock", "SpoolError", "read_spool"]

HEADER_BYTES = 64 * 1024
VERSION = 1
MAX_BLOCKS = 64
MAX_PAGES = 1 << 34


class SpoolError(PageferryError):
    """A file that is no spool, or a broken one."""


@dataclass(frozen=True)
class SpoolBlock:
    """Where the parts of one RAMBlock lie in the spool, in bytes."""

    name: str
    pages: int
    owed_at: int
    pages_at: int


@dataclass(frozen=True)
class Spool:
    """A spool's header, checked against the file's length."""

    path: str
    migration: bytes | None
    blocks: tuple[SpoolBlock, ...]

    def owed(self, block: SpoolBlock) -> Bitmap:
        """The pages of `block` that are in the spool. Raises OSError, SpoolError."""
        length = -(-block.pages // 64) * 8
        with open(self.path, "rb") as file:
            file.seek(block.owed_at)
            raw = file.read(length)
        if len(raw) != length:
            raise SpoolError(f"{self.path}: ends within the map of '{block.name}'")
        return Bitmap.from_bytes(block.pages, raw)


def _lay_out(sizes: Mapping[str, int]) -> tuple[tuple[SpoolBlock, ...], int]:
    """The blocks' places, and the file's length."""
    blocks, at = [], HEADER_BYTES
    for name, pages in sizes.items():
        map_bytes = -(-pages // 64) * 8
        pages_at = at + -(-map_bytes // PAGE_SIZE_BYTES) * PAGE_SIZE_BYTES
        blocks.append(SpoolBlock(name, pages, at, pages_at))
        at = pages_at + pages * PAGE_SIZE_BYTES
    return tuple(blocks), at


def _header(migration: bytes | None, blocks: Sequence[SpoolBlock]) -> bytes:
    value = {
        "pageferry-spool": VERSION,
        "migration": None if migration is None else migration.hex(),
        "blocks": [vars(block) for block in blocks],
    }
    return json.dumps(value).encode().ljust(HEADER_BYTES)


class Keeper:
    """A process that outlives this one to write the spool; one for each migration.

    Start it after the hand-over, when the guest's RAM changes no more, and `dismiss` it when the destination
    has everything, or when the guest is to run here again.
    """

    def __init__(
        self, path: str, migration: bytes | None, blocks: Sequence[RAMBlock], owed: Mapping[str, Bitmap]
    ) -> None:
        """Raises OSError: no process or pipe is to be had."""
        places, length = _lay_out({block.name: block.page_count for block in blocks})
        header = _header(migration, places)
        structs = ffi.new("struct pp_spool_block[]", len(blocks))
        for struct, block, place in zip(structs, blocks, places, strict=True):
            struct.host = ffi.cast("uint8_t *", block.host_address)
            struct.pages = block.page_count
            struct.owed = ffi.cast("uint64_t *", owed[block.name].address)
            struct.owed_at, struct.pages_at = place.owed_at, place.pages_at
        kept = [ffi.from_buffer(each) for each in (header, os.fsencode(path) + b"\0")]
        unfinished = ffi.from_buffer(os.fsencode(f"{path}.{os.getpid()}.unfinished") + b"\0")
        spool = ffi.new(
            "struct pp_spool *",
            {
                "blocks": structs,
                "block_count": len(blocks),
                "header": ffi.cast("uint8_t *", kept[0]),
                "header_length": len(header),
                "length": length,
                "path": ffi.cast("char *", kept[1]),
                "unfinished": ffi.cast("char *", unfinished),
            },
        )
        keeper_fd, self._fd = os.pipe()
        try:
            self.pid = check(lib.pp_keeper_start(spool, keeper_fd), "Cannot start the keeper")
        except OSError:
            os.close(self._fd)
            raise
        finally:
            os.close(keeper_fd)

    def dismiss(self) -> None:
        """It is not needed any more; waits until it is gone, which takes no time. Once."""
        with contextlib.suppress(BrokenPipeError):  # somebody killed it
            os.write(self._fd, b"d")
        os.close(self._fd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def read_spool(path: str) -> Spool:
    """The header of a spool.

    Raises:
        SpoolError: it is none, says what and where.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
        length = os.fstat(file.fileno()).st_size
    try:
        value: Any = json.loads(raw)
        if value["pageferry-spool"] != VERSION:
            raise SpoolError(f"{path}: spool version {value['pageferry-spool']}, expected {VERSION}")
        migration = None if value["migration"] is None else bytes.fromhex(value["migration"])
        blocks = tuple(SpoolBlock(**block) for block in value["blocks"])
        expected, end = _lay_out({block.name: block.pages for block in blocks})
    except (ValueError, KeyError, TypeError) as error:
        raise SpoolError(f"{path}: not a spool of a Pageferry source ({error!r})") from error
    if blocks != expected or not 0 < len(blocks) <= MAX_BLOCKS:
        raise SpoolError(f"{path}: the RAMBlocks of this spool do not lie where they should")
    if length != end:
        raise SpoolError(f"{path}: the spool has {length} bytes, expected {end}")
    return Spool(path, migration, blocks)
