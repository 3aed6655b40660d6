"""The pieces of a boot image in guest RAM: all of them are checked before the first one is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from vmm.boot.elf import Segment
from vmm.errors import BootError
from vmm.ram import GuestRam

__all__ = ["PiecesImage"]


class PiecesImage(ABC):
    """A checked boot image, whatever its kind. `load` may be repeated: a reset loads it again."""

    name: str

    @abstractmethod
    def _pieces(self, ram: GuestRam) -> list[Segment]:
        """Everything that goes into this guest's RAM. Raises BootError if it cannot fit."""

    def check(self, ram: GuestRam) -> None:
        """Raises BootError if a piece of the image lies where there is no RAM."""
        _check_pieces(self.name, ram, self._pieces(ram))

    def load(self, ram: GuestRam) -> None:
        """Write it. May wait for pages that are still at a migration source.

        Raises BootError as `check`; then nothing was written.
        """
        pieces = self._pieces(ram)
        _check_pieces(self.name, ram, pieces)
        _load_pieces(ram, pieces)


def _check_pieces(name: str, ram: GuestRam, pieces: Iterable[Segment]) -> None:
    """Raises BootError if a piece lies where there is no RAM."""
    for piece in pieces:
        if not _is_ram(ram, piece.guest_address, piece.length):
            needed = f"{piece.length:#x} bytes at {piece.guest_address:#x}"
            size = f"the guest has {ram.length_bytes:#x} bytes"
            raise BootError(f"{name}: Does not fit into guest RAM: needs {needed}, {size}")


def _load_pieces(ram: GuestRam, pieces: Iterable[Segment]) -> None:
    """Write them; what a piece has no data for is cleared. May wait for pages of postcopy."""
    for piece in pieces:
        ram.write(piece.guest_address, piece.data, may_wait=True)
        _clear(ram, piece.guest_address + len(piece.data), piece.length - len(piece.data))


def _is_ram(ram: GuestRam, address: int, length: int) -> bool:
    end = address + length
    for region in ram.map:
        if region.guest_address <= address < region.guest_address + region.length:
            address = min(end, region.guest_address + region.length)
    return address == end


def _clear(ram: GuestRam, address: int, length: int) -> None:
    for region in ram.map:
        first = max(address, region.guest_address)
        end = min(address + length, region.guest_address + region.length)
        if first < end:
            region.block.fill(region.offset + first - region.guest_address, end - first, 0, may_wait=True)
