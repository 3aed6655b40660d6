"""Virtual to physical addresses, as the CPU's paging does it: for a monitor that looks at guest memory. Pure.

    no paging    the address itself
    32 bit       directory[31:22] -> table[21:12]                 4 MiB pages if CR4.PSE
    PAE          pointers[31:30] -> directory[29:21] -> table     2 MiB pages
    long mode    PML4[47:39] -> pointers[38:30] -> directory -> table     1 GiB and 2 MiB pages

Rights are not checked. Source: Intel SDM vol. 3, chapter 4.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.vmstate import Values

__all__ = ["PAGE", "Physical", "translate"]

Physical = Callable[[int, int], bytes]
"""Reads guest physical memory: address and length. Raises where there is no RAM."""

PAGE = 4096
CR0_PG, CR4_PSE, CR4_PAE, EFER_LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 10
PRESENT, HUGE = 0x1, 0x80
FRAME = 0x000F_FFFF_FFFF_F000


def translate(read: Physical, cpu: Values, address: int) -> int | None:
    """The physical address; None where nothing is mapped. `cpu` has the names of CPU_DESCRIPTION."""
    address &= (1 << 64) - 1
    if not cpu["env.cr[0]"] & CR0_PG:
        return address & 0xFFFF_FFFF
    if cpu["env.efer"] & EFER_LMA:
        if address >> 47 not in (0, (1 << 17) - 1):
            return None  # not canonical
        return _walk(read, cpu["env.cr[3]"] & FRAME, address, (39, 30, 21, 12), 8, huge=True)
    address &= 0xFFFF_FFFF
    if cpu["env.cr[4]"] & CR4_PAE:
        at = (cpu["env.cr[3]"] & 0xFFFF_FFE0) + (address >> 30) * 8
        entry = int.from_bytes(read(at, 8), "little")
        return _walk(read, entry & FRAME, address, (21, 12), 8, huge=True) if entry & PRESENT else None
    root = cpu["env.cr[3]"] & 0xFFFF_F000
    return _walk(read, root, address, (22, 12), 4, huge=bool(cpu["env.cr[4]"] & CR4_PSE))


def _walk(
    read: Physical, table: int, address: int, shifts: tuple[int, ...], entry_bytes: int, *, huge: bool
) -> int | None:
    index_mask = PAGE // entry_bytes - 1
    for shift in shifts:
        at = table + (address >> shift & index_mask) * entry_bytes
        entry = int.from_bytes(read(at, entry_bytes), "little")
        if not entry & PRESENT:
            return None
        table = entry & FRAME
        if shift == shifts[-1] or (huge and entry & HUGE and shift <= 30):
            offset = (1 << shift) - 1
            return table & ~offset | address & offset
    return None
