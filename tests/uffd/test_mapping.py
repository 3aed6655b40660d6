"""uffd/mapping.py: memory by copies, and what discarding means for each kind of it."""

from __future__ import annotations

import os
import pathlib
import re
import signal
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffd import BitWords, Mapping, MappingKind, OutOfMemory

New = Callable[[int, MappingKind], Mapping]


def smaps_entry(address: int) -> str:
    text = pathlib.Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address:x}-.*?(?=^[0-9a-f]+-|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def test_what_was_written_is_read(new_mapping: New, kind: MappingKind) -> None:
    mapping = new_mapping(4, kind)
    assert mapping.read(0, 4096 * 4) == bytes(4096 * 4)
    mapping.write(4090, b"across a page")
    mapping.fill(8192, 100, 0x5A)
    assert mapping.read(4090, 13) == b"across a page"
    assert mapping.read(8192, 101) == b"Z" * 100 + b"\0"
    buffer = bytearray(3)
    mapping.read_into(4090, memoryview(buffer))
    assert buffer == b"acr"
    assert mapping.is_equal(4090, b"across a page")
    assert not mapping.is_equal(4090, b"across a pagf")


@given(st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 8191))
def test_is_zero_finds_the_one_byte(start: int, length: int, dirty: int) -> None:
    mapping = Mapping(8192)
    try:
        mapping.write(dirty, b"\1")
        assert mapping.is_zero(start, length) == (not start <= dirty < start + length)
    finally:
        mapping.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 8193), (8192, 1), (4096, -1)])
def test_a_range_outside_is_an_index_error(new_mapping: New, offset: int, length: int) -> None:
    mapping = new_mapping(2, MappingKind.ANONYMOUS)
    with pytest.raises(IndexError):
        mapping.read(offset, length)
    with pytest.raises(IndexError):
        mapping.fill(offset, length, 0)
    with pytest.raises(IndexError):
        mapping.is_zero(offset, length)


def test_data_that_does_not_fit_is_not_written(new_mapping: New) -> None:
    mapping = new_mapping(1, MappingKind.ANONYMOUS)
    with pytest.raises(IndexError):
        mapping.write(4094, b"abc")
    with pytest.raises(IndexError):
        mapping.is_equal(4094, b"abc")
    assert mapping.is_zero(0, 4096)


@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (0, 100)])
def test_pages_are_discarded_whole_or_not_at_all(new_mapping: New, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        new_mapping(2, MappingKind.ANONYMOUS).discard(offset, length)


@pytest.mark.parametrize("length", [0, -4096, 100])
def test_a_length_that_is_not_pages_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        Mapping(length)


def test_more_than_the_address_space_is_out_of_memory(kind: MappingKind) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OutOfMemory):
        Mapping(1 << 60, kind)
    assert len(os.listdir("/proc/self/fd")) == before


def test_discard_gives_zeroes_and_gives_back_the_file(new_mapping: New, kind: MappingKind) -> None:
    mapping = new_mapping(4, kind)
    mapping.fill(0, 4 * 4096, 7)
    mapping.discard(4096, 2 * 4096)
    mapping.discard(0, 0)
    assert mapping.is_equal(0, b"\7" * 4096)
    if mapping.fd is not None:
        bits = BitWords(4)
        assert mapping.find_data(0, 4 * 4096, bits.address) == 2
        assert bits.word(0) == 0b1001
    assert mapping.is_zero(4096, 2 * 4096)
    assert mapping.is_equal(3 * 4096, b"\7" * 4096)


def test_find_data_of_a_part(new_mapping: New) -> None:
    mapping = new_mapping(8, MappingKind.MEMFD_SHARED)
    for page in (0, 3, 4, 7):
        mapping.fill(page * 4096, 1, 1)
    bits = BitWords(4)
    assert mapping.find_data(2 * 4096, 4 * 4096, bits.address) == 2
    assert bits.word(0) == 0b0110
    assert mapping.find_data(2 * 4096, 4 * 4096, bits.address) == 0
    with pytest.raises(ValueError, match="no file"):
        new_mapping(1, MappingKind.ANONYMOUS).find_data(0, 4096, bits.address)


def test_it_is_not_in_a_child_nor_in_a_core_and_has_guards(new_mapping: New, kind: MappingKind) -> None:
    mapping = new_mapping(2, kind)
    flags = next(line for line in smaps_entry(mapping.address).splitlines() if line.startswith("VmFlags"))
    assert " dc" in flags  # MADV_DONTFORK
    assert " dd" in flags  # MADV_DONTDUMP
    assert mapping.address % (2 << 20) == 0
    for guard in (mapping.address - 4096, mapping.address + mapping.length):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.close(2)
            try:
                Mapping.read_into(_at(guard), 0, bytearray(1))
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def _at(address: int) -> Mapping:
    mapping = Mapping.__new__(Mapping)
    mapping.address, mapping.length, mapping.fd = address, 4096, None
    return mapping


def test_huge_pages_are_advised_and_ruled_out(new_mapping: New) -> None:
    mapping = new_mapping(1024, MappingKind.ANONYMOUS)
    mapping.use_huge_pages(True)
    huge = smaps_entry(mapping.address)
    mapping.use_huge_pages(False)
    if " hg" in huge:  # else the kernel has none
        assert " nh" in smaps_entry(mapping.address)


def test_64_gib_cost_nothing_before_they_are_touched(kind: MappingKind) -> None:
    mapping = Mapping(64 << 30, kind)
    try:
        mapping.write((64 << 30) - 1, b"\xff")
        assert mapping.read((64 << 30) - 2, 2) == b"\0\xff"
        assert "Rss:                   4 kB" in smaps_entry(mapping.address)
    finally:
        mapping.close()


def test_close_ends_it(kind: MappingKind) -> None:
    mapping = Mapping(4096, kind)
    address = mapping.address
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.read(0, 1)
    assert not re.search(rf"^{address:x}-", pathlib.Path("/proc/self/maps").read_text(), re.MULTILINE)
