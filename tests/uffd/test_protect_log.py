"""uffd/protect_log.py: the loop that answers write-protect faults."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.support.requires import requires
from uffd import BitWords, Features, Mapping, MappingKind, Mode, ProtectLog, UffdError, Userfaultfd

NewMapping = Callable[[int, MappingKind], Mapping]
NewUserfaultfd = Callable[[Features], Userfaultfd]

WP = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM


@pytest.fixture(autouse=True)
def needs_userfaultfd() -> None:
    requires("uffd")


def test_faults_of_two_ranges_become_bits(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, kind: MappingKind
) -> None:
    mappings = [new_mapping(5000, kind), new_mapping(3, kind)]
    userfaultfd = new_userfaultfd(WP)
    log = ProtectLog(userfaultfd, 2)
    numbers = [log.add(mapping.address, mapping.length // 4096) for mapping in mappings]
    for mapping in mappings:
        mapping.fill(0, mapping.length, 1)
        userfaultfd.register(mapping.address, mapping.length, Mode.WP)
    log.start("mig/dirty-log")
    for mapping in mappings:
        userfaultfd.protect(mapping.address, mapping.length)
    assert "mig/dirty-log" in [thread.name for thread in threading.enumerate()]
    for page in (0, 63, 64, 65, 4095, 4096, 4999):
        mappings[0].write(page * 4096, b"xx")
        mappings[0].write(page * 4096, b"yy")
    mappings[1].write(2 * 4096, b"z")
    assert log.fault_count == 8
    first, second = BitWords(5000), BitWords(3)
    assert log.collect(numbers[0], first.address) == 7
    assert log.collect(numbers[1], second.address) == 1
    assert second.word(0) == 0b100
    assert [page for page in range(5000) if first.word(page // 64) >> page % 64 & 1] == [
        *(0, 63, 64, 65, 4095, 4096, 4999)
    ]
    assert log.collect(numbers[0], BitWords(5000).address) == 0
    mappings[0].write(64 * 4096, b"again")
    assert log.collect(numbers[0], BitWords(5000).address) == 1
    for mapping in mappings:
        userfaultfd.unregister(mapping.address, mapping.length)
    log.stop()
    log.stop()


def test_an_error_of_the_loop_is_kept_for_collect_and_raised_by_stop(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd
) -> None:
    mapping = new_mapping(1, MappingKind.ANONYMOUS)
    userfaultfd = new_userfaultfd(WP)
    log = ProtectLog(userfaultfd, 1)
    number = log.add(mapping.address, 1)
    mapping.fill(0, 1, 1)
    stranger = new_mapping(1, MappingKind.ANONYMOUS)
    stranger.fill(0, 1, 1)
    userfaultfd.register(stranger.address, 4096, Mode.WP)
    userfaultfd.protect(stranger.address, 4096)
    log.start("mig/dirty-log")
    writer = threading.Thread(target=stranger.write, args=(0, b"x"), daemon=True)
    writer.start()
    assert log._thread is not None
    log._thread.join(20)  # a fault that is not in its ranges ends the loop
    with pytest.raises(UffdError, match="has ended"):
        log.collect(number, BitWords(1).address)
    userfaultfd.unregister(stranger.address, 4096)
    writer.join(20)
    assert not writer.is_alive()
    with pytest.raises(UffdError, match="EPROTO"):
        log.stop()


def test_more_ranges_than_announced(new_userfaultfd: NewUserfaultfd) -> None:
    log = ProtectLog(new_userfaultfd(WP), 0)
    with pytest.raises(UffdError, match="ENOSPC"):
        log.add(4096, 1)
    log.stop()
