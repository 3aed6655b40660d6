"""The checksum of a page record: C and Python say the same, and no flipped bit passes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.migration.bitmap import Bitmap
from vmm.migration.checksum import checksum as plain
from vmm.migration.checksum import crc32c
from vmm.migration.page_pump.checksums import checksum, checksum_portable, digest

PAGE = 4096
CONTENTS = {
    "random": random.Random(1).randbytes(PAGE),
    "zero": bytes(PAGE),
    "ones": b"\xff" * PAGE,
}


def test_the_polynomial_is_castagnolis() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@given(
    st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=255),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=200) | st.integers().map(lambda seed: random.Random(seed).randbytes(PAGE)),
)
def test_c_says_what_python_says(name: str, word: int, content: bytes) -> None:
    expected = plain(name, word, content)
    assert checksum(name, word, content) == expected
    assert checksum_portable(name, word, content) == expected


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_no_flipped_bit_of_a_page_passes(content: bytes) -> None:
    right, flipped = checksum("ram", 0x5008, content), bytearray(content)
    for bit in range(8 * PAGE):
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksum("ram", 0x5008, bytes(flipped)) != right, bit
        flipped[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("content", [*CONTENTS.values(), b"\0"], ids=[*CONTENTS, "fill byte"])
def test_no_flipped_bit_of_place_or_kind_passes(content: bytes) -> None:
    right = checksum("ram", 0x5008, content)
    assert all(checksum("ram", 0x5008 ^ 1 << bit, content) != right for bit in range(64))
    for at, bit in ((at, bit) for at in range(3) for bit in range(7)):
        name = bytearray(b"ram")
        name[at] ^= 1 << bit
        assert checksum(name.decode(), 0x5008, content) != right


@given(st.integers(0, PAGE - 4), st.integers(1, 0xFFFFFFFF), st.integers())
def test_no_burst_of_32_bits_passes(at: int, burst: int, seed: int) -> None:
    content = random.Random(seed).randbytes(PAGE)
    changed = int.from_bytes(content[at : at + 4], "little") ^ burst
    damaged = content[:at] + changed.to_bytes(4, "little") + content[at + 4 :]
    assert checksum("ram", 8, damaged) != checksum("ram", 8, content)


def test_every_page_counts_in_a_digest() -> None:
    maps = {"ram": Bitmap(100), "rom": Bitmap(64)}
    maps["ram"].set_range(3, 50)
    right = digest(maps)
    assert digest(dict(reversed(maps.items()))) == right
    for name, page in [("ram", 0), ("ram", 53), ("ram", 99), ("rom", 0), ("rom", 63)]:
        maps[name].set(page)
        assert digest(maps) != right
        maps[name].clear(page)
    assert digest(maps) == right
