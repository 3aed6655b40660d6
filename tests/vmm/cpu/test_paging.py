"""Each way of paging finds what its tables say, and nothing where they say nothing."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from vmm.cpu.paging import translate

PG, PSE, PAE, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 10
P, HUGE, NX = 1, 0x80, 1 << 63

Tables = dict[int, int]


def state(cr4: int = 0, efer: int = 0, cr0: int = PG, cr3: int = 0x1000) -> dict[str, Any]:
    return {"env.cr[0]": cr0, "env.cr[3]": cr3, "env.cr[4]": cr4, "env.efer": efer}


LONG = {
    0x1000 + 8 * 1: 0x2000 | P, 0x2000 + 8 * 2: 0x3000 | P, 0x3000 + 8 * 3: 0x4000 | P,
    0x4000 + 8 * 4: 0x55000 | P | NX, 0x2000 + 8 * 5: 7 << 30 | P | HUGE, 0x3000 + 8 * 6: 9 << 21 | P | HUGE,
    0x1000 + 8 * 511: 0x2000 | P,
}  # fmt: skip
PAE_TABLES = {0x1000 + 8 * 3: 0x3000 | P, 0x3000 + 8 * 3: 0x4000 | P, 0x4000 + 8 * 4: 0x55000 | P,
              0x3000 + 8 * 6: 9 << 21 | P | HUGE}  # fmt: skip
PLAIN = {0x1000 + 4 * 3: 0x4000 | P, 0x4000 + 4 * 4: 0x55000 | P, 0x1000 + 4 * 6: 9 << 22 | P | HUGE}
AT = 1 << 39 | 2 << 30

CASES = {
    "no paging": (state(cr0=0), {}, 0x1_2345_6789, 0x2345_6789),
    "long, 4 KiB": (state(PAE, LMA), LONG, AT | 3 << 21 | 4 << 12 | 0x123, 0x55123),
    "long, 2 MiB": (state(PAE, LMA), LONG, AT | 6 << 21 | 0x12345, 9 << 21 | 0x12345),
    "long, 1 GiB": (state(PAE, LMA), LONG, 1 << 39 | 5 << 30 | 0x3456789, 7 << 30 | 0x3456789),
    "long, upper half": (
        state(PAE, LMA), LONG, 0xFFFF << 48 | 511 << 39 | 2 << 30 | 3 << 21 | 4 << 12, 0x55000,
    ),
    "long, not canonical": (state(PAE, LMA), LONG, 1 << 47, None),
    "long, not mapped": (state(PAE, LMA), LONG, AT | 3 << 21 | 5 << 12, None),
    "PAE, 4 KiB": (state(PAE), PAE_TABLES, 3 << 30 | 3 << 21 | 4 << 12 | 5, 0x55005),
    "PAE, 2 MiB": (state(PAE), PAE_TABLES, 3 << 30 | 6 << 21 | 5, 9 << 21 | 5),
    "PAE, no pointer": (state(PAE), PAE_TABLES, 0, None),
    "32 bit, 4 KiB": (state(), PLAIN, 3 << 22 | 4 << 12 | 7, 0x55007),
    "32 bit, 4 MiB": (state(PSE), PLAIN, 6 << 22 | 0x12345, 9 << 22 | 0x12345),
}  # fmt: skip


@pytest.mark.parametrize(("cpu", "tables", "address", "expected"), CASES.values(), ids=CASES)
def test_translate(cpu: dict[str, Any], tables: Tables, address: int, expected: int | None) -> None:
    def read(at: int, length: int) -> bytes:
        return struct.pack("<Q", tables.get(at, 0))[:length]

    assert translate(read, cpu, address) == expected
