"""The RAMBlocks as the page pump sees them: addresses and page maps, one C array for a whole migration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.migration.bitmap import Bitmap
from vmm.migration.page_pump.native import ffi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.ram import RAMBlock

__all__ = ["DESTINATION_MAPS", "SOURCE_MAPS", "PumpBlocks"]

SOURCE_MAPS = ("dirty", "sent", "populated", "queued", "urgent")
DESTINATION_MAPS = ("received", "requested", "zero")


class PumpBlocks:
    """C structs for `blocks`, with a Bitmap for each name in `maps`: `maps["dirty"]["pc.ram"]`."""

    def __init__(self, blocks: Sequence[RAMBlock], maps: Sequence[str]) -> None:
        self.names = [block.name for block in blocks]
        self.blocks = tuple(blocks)
        self.maps = {kind: {block.name: Bitmap(block.page_count) for block in blocks} for kind in maps}
        self.array: Any = ffi.new("struct pp_block[]", len(blocks))
        for struct, block in zip(self.array, blocks, strict=True):
            struct.host = ffi.cast("uint8_t *", block.host_address)
            struct.pages = block.page_count
            struct.fd = -1 if block.fd is None else block.fd
            struct.name = block.name.encode()
            for kind in maps:
                setattr(struct, kind, ffi.cast("uint64_t *", self.maps[kind][block.name].address))

    def index(self, name: str) -> int:
        """Position of a block in the array. Raises ValueError if there is none of that name."""
        return self.names.index(name)

    def count(self, kind: str) -> int:
        """Set bits of one kind of map over all blocks."""
        return sum(bitmap.count() for bitmap in self.maps[kind].values())
