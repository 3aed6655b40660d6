"""What a stock peer sent and no device of ours has: kept, and given back when the guest goes on.

    stock --(pc.bios, fw_cfg, apic, ...)--> kept --(the same, clocks advanced)--> the next machine

RAMBlocks of it are received like any other, by postcopy too, but the guest does not see them here. Sections
are read by the tables of `stock_sections.py`; one that is in no table is refused.

Used by one migration at a time: mig/load fills it, mig/source reads it.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from vmm.errors import VMStateError
from vmm.migration.errors import StreamMismatch
from vmm.migration.stock_sections import STOCK_BLOCKS, STOCK_SECTIONS, StockSection, interrupts_in_use
from vmm.ram import RAMBlock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.vmstate import Description, Values

__all__ = ["KeptSection", "KeptState"]

log = logging.getLogger(__name__)


class KeptSection:
    """One section of a peer; fits `vmm.vmstate.Section` once it was loaded."""

    def __init__(self, section: StockSection) -> None:
        self._section = section
        self._values: Values | None = None

    @property
    def idstr(self) -> str:
        return self._section.description.name

    @property
    def instance_id(self) -> int:
        return self._section.instance_id

    @property
    def description(self) -> Description:
        return self._section.description

    @property
    def came(self) -> bool:
        """Did a peer send it?"""
        return self._values is not None

    def save(self) -> Values:
        """As it came."""
        assert self._values is not None, "only what came is sent"
        return copy.deepcopy(self._values)

    def advanced(self, now_ns: int, elapsed_ns: int) -> Values:
        """As it is now, `elapsed_ns` of the guest's time after it came."""
        values = self.save()
        self._section.advance(values, now_ns, elapsed_ns)
        return values

    def load(self, values: Values, version: int) -> None:
        """Keep it. Raises VMStateError if the guest cannot go on without it."""
        del version
        if interrupts_in_use(self.idstr, values):
            raise VMStateError(
                "The guest waits for interrupts of a controller that there is not here",
                self.idstr,
                expected="a guest that uses the 8259A interrupt controllers (Linux: noapic nolapic)",
                got=f"{self.idstr} in use",
            )
        self._values = values


class KeptState:
    """All of it, for one machine."""

    def __init__(self) -> None:
        self.blocks: tuple[RAMBlock, ...] = ()
        self.sections = tuple(KeptSection(section) for section in STOCK_SECTIONS)
        """Every section that may come; `came` says which have."""
        self.clock_ns = 0
        """The guest's time when the sections came."""

    def forget(self) -> None:
        """The guest is another one: nothing was kept for it. No thread uses the blocks any more."""
        self.forget_sections()
        for block in self.blocks:
            block.close()
        self.blocks = ()

    def forget_sections(self) -> None:
        """The guest was reset: the peer's devices are as after a reset, too."""
        self.sections = tuple(KeptSection(section) for section in STOCK_SECTIONS)

    def admit(self, sizes: Mapping[str, int], offset: int | None = None) -> None:
        """Make room for RAMBlocks of the source (name -> bytes) that the guest does not have here.

        Raises StreamMismatch if one is not known, or too long.
        """
        for name, length in sizes.items():
            limit = STOCK_BLOCKS.get(name)
            if limit is None:
                expected = "one of the machine's, or " + ", ".join(STOCK_BLOCKS)
                text = f"Unknown ramblock '{name}', cannot accept migration"
                raise StreamMismatch(text, offset=offset, expected=expected, got=name)
            if length > limit:
                text = f"Length of RAMBlock '{name}'"
                raise StreamMismatch(text, offset=offset, expected=f"{limit:#x} at most", got=hex(length))
        self.blocks = tuple(RAMBlock(name, length) for name, length in sizes.items())
        for block in self.blocks:
            block.use_huge_pages(False)

    def save(self, now_ns: int) -> list[tuple[KeptSection, Values]]:
        """What came, as it is when the guest's clock shows `now_ns`."""
        elapsed_ns = max(now_ns - self.clock_ns, 0)
        return [(section, section.advanced(now_ns, elapsed_ns)) for section in self.sections if section.came]
