"""uffd/bits.py: bits set and taken by address."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffd import BitWords, set_bits, take_bits


def bits_of(words: BitWords) -> set[int]:
    return {
        64 * index + bit
        for index in range(words.word_count)
        for bit in range(64)
        if words.word(index) >> bit & 1
    }


@given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 200)), max_size=8))
def test_set_and_take_agree_with_a_set(ranges: list[tuple[int, int]]) -> None:
    source, target = BitWords(200), BitWords(200)
    set_bits(target.address, 10, 5)
    model: set[int] = set()
    for first, count in ranges:
        count = min(count, 200 - first)
        set_bits(source.address, first, count)
        model |= set(range(first, first + count))
    assert bits_of(source) == model
    assert take_bits(source.address, target.address, source.word_count) == len(model - set(range(10, 15)))
    assert bits_of(source) == set()
    assert bits_of(target) == model | set(range(10, 15))


def test_no_bit_is_lost_between_a_setter_and_a_taker() -> None:
    source, target = BitWords(1 << 16), BitWords(1 << 16)

    def set_all() -> None:
        for first in range(0, 1 << 16, 16):
            set_bits(source.address, first, 16)

    setter = threading.Thread(target=set_all)
    setter.start()
    fresh = 0
    while setter.is_alive():
        fresh += take_bits(source.address, target.address, source.word_count)
    setter.join()
    fresh += take_bits(source.address, target.address, source.word_count)
    assert fresh == 1 << 16


def test_a_word_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        BitWords(64).word(1)
