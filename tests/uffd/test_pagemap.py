"""uffd/pagemap.py: present and written pages as bits."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest

from tests.support.requires import requires
from uffd import (
    BitWords,
    Features,
    Mapping,
    MappingKind,
    Mode,
    NotRegistered,
    PagemapScanner,
    UffdUnavailable,
    Userfaultfd,
    is_swap_configured,
)
from uffd._native import lib

NewMapping = Callable[[int, MappingKind], Mapping]
NewUserfaultfd = Callable[[Features], Userfaultfd]

ASYNC = Features.WP_ASYNC | Features.PAGEFAULT_FLAG_WP


@pytest.fixture
def scanner() -> Iterator[PagemapScanner]:
    made = PagemapScanner()
    yield made
    made.close()
    made.close()


def pages_of(bits: BitWords) -> list[int]:
    return [64 * w + b for w in range(bits.word_count) for b in range(64) if bits.word(w) >> b & 1]


def test_written_pages_are_taken_once(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, scanner: PagemapScanner, kind: MappingKind
) -> None:
    requires("wp_async")
    mapping = new_mapping(200, kind)
    mapping.fill(5 * 4096, 1, 1)
    new_userfaultfd(ASYNC).register(mapping.address, mapping.length, Mode.WP)
    bits = BitWords(200)
    assert scanner.take_written(mapping.address, mapping.length, bits.address) == 1  # existed: counts
    for page in (0, 5, 64, 65, 199):
        mapping.fill(page * 4096, 1, 2)
    assert scanner.peek_written(mapping.address, mapping.length, bits.address) == 4
    bits = BitWords(200)
    assert scanner.take_written(mapping.address, mapping.length, bits.address) == 5
    assert pages_of(bits) == [0, 5, 64, 65, 199]
    assert scanner.take_written(mapping.address, mapping.length, bits.address) == 0
    mapping.fill(5 * 4096, 1, 3)
    assert scanner.take_written(mapping.address, mapping.length, bits.address) == 0  # is known in `bits`
    assert scanner.take_written(mapping.address, mapping.length, BitWords(200).address) == 0  # and was taken


def test_more_runs_than_one_call_reports(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, scanner: PagemapScanner
) -> None:
    requires("wp_async")
    mapping = new_mapping(5000, MappingKind.ANONYMOUS)
    new_userfaultfd(ASYNC).register(mapping.address, mapping.length, Mode.WP)
    for page in range(0, 5000, 2):
        mapping.fill(page * 4096, 1, 1)
    bits = BitWords(5000)
    assert scanner.take_written(mapping.address, mapping.length, bits.address) == 2500
    assert pages_of(bits) == list(range(0, 5000, 2))
    assert scanner.take_written(mapping.address, mapping.length, bits.address) == 0


def test_a_range_that_is_not_registered_is_an_error_not_clean(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, scanner: PagemapScanner, kind: MappingKind
) -> None:
    requires("wp_async")
    mapping = new_mapping(4, kind)
    mapping.fill(0, 4 * 4096, 1)
    bits = BitWords(4)
    with pytest.raises(NotRegistered):
        scanner.take_written(mapping.address, mapping.length, bits.address)
    userfaultfd = new_userfaultfd(ASYNC)
    userfaultfd.register(mapping.address, 2 * 4096, Mode.WP)
    with pytest.raises(NotRegistered):
        scanner.take_written(mapping.address, mapping.length, bits.address)


def test_populated_by_both_ways(new_mapping: NewMapping, scanner: PagemapScanner) -> None:
    mapping = new_mapping(10_000, MappingKind.ANONYMOUS)
    pages = [0, 1, 63, 64, 4096, 9999]
    for page in pages:
        mapping.fill(page * 4096, 1, 1)
    scanned, read = BitWords(10_000), BitWords(10_000)
    assert scanner.find_populated(mapping.address, mapping.length, scanned.address) == 6
    assert scanner.read_populated(mapping.address, mapping.length, read.address, swapped=False) == 6
    assert pages_of(scanned) == pages_of(read) == pages


def test_an_old_kernel_is_read_page_by_page(
    new_mapping: NewMapping, scanner: PagemapScanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldKernel:
        """The C module on a kernel without the ioctl."""

        def __getattr__(self, name: str) -> object:
            return (lambda *_: -25) if name == "pagemap_scan" else getattr(lib, name)

    mapping = new_mapping(100, MappingKind.ANONYMOUS)
    mapping.fill(70 * 4096, 1, 1)
    monkeypatch.setattr("uffd.pagemap.lib", OldKernel())
    bits = BitWords(100)
    assert scanner.find_populated(mapping.address, mapping.length, bits.address) == 1
    assert pages_of(bits) == [70]


def test_a_pagemap_that_cannot_be_opened_says_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoProc:
        """The C module where /proc is not mounted."""

        def pagemap_open(self) -> int:
            return -2

    monkeypatch.setattr("uffd.pagemap.lib", NoProc())
    with pytest.raises(UffdUnavailable, match=r"ENOENT.*mount /proc"):
        PagemapScanner()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Filename Type Size\n", False), ("Filename Type Size\n/dev/vdb partition 1\n", True), (None, True)],
)
def test_swap_is_found(tmp_path: pathlib.Path, text: str | None, expected: bool) -> None:
    path = tmp_path / "swaps"
    if text is not None:
        path.write_text(text)
    assert is_swap_configured(path) is expected
