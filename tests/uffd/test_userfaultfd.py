"""uffd/userfaultfd.py: what placing, waking and protecting do, on each kind of memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest

from tests.support.requires import requires
from uffd import (
    AlreadyRegistered,
    Features,
    KernelRefused,
    Mapping,
    MappingKind,
    Mode,
    NotRegistered,
    UffdError,
    UffdUnavailable,
    Userfaultfd,
    probe,
    userfaultfd,
)

NewMapping = Callable[[int, MappingKind], Mapping]
NewUserfaultfd = Callable[[Features], Userfaultfd]

WP = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def needs_userfaultfd() -> None:
    requires("uffd")


class Toucher:
    """A thread that reads one byte, and so waits if its page is missing."""

    def __init__(self, mapping: Mapping, offset: int) -> None:
        self.value: int | None = None
        self._mapping, self._offset = mapping, offset
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        self.value = self._mapping.read(self._offset, 1)[0]

    def has_ended(self) -> bool:
        self._thread.join(DEADLINE_S)
        return not self._thread.is_alive()


def wait_for_fault(descriptor: Userfaultfd) -> userfaultfd.Fault:
    """The next fault; this thread holds the GIL while it looks, so a toucher that held it would hang."""
    while True:
        faults = descriptor.read_faults_nowait()
        if faults:
            return faults[0]


@pytest.fixture
def source(new_mapping: NewMapping) -> Mapping:
    mapping = new_mapping(8, MappingKind.ANONYMOUS)
    for page in range(8):
        mapping.fill(page * 4096, 4096, 0x10 + page)
    return mapping


@pytest.fixture
def missing(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, kind: MappingKind
) -> tuple[Mapping, Userfaultfd]:
    """Eight missing pages."""
    mapping = new_mapping(8, kind)
    descriptor = new_userfaultfd(Features.MISSING_SHMEM | Features.THREAD_ID)
    descriptor.register(mapping.address, mapping.length, Mode.MISSING)
    return mapping, descriptor


def test_a_touch_waits_for_its_page(missing: tuple[Mapping, Userfaultfd], source: Mapping) -> None:
    mapping, descriptor = missing
    toucher = Toucher(mapping, 3 * 4096 + 5)
    fault = wait_for_fault(descriptor)
    assert fault.address & ~4095 == mapping.address + 3 * 4096
    assert not fault.is_protected
    assert not fault.is_write
    assert fault.thread_id != os.getpid()
    assert toucher.value is None
    assert descriptor.copy(mapping.address + 3 * 4096, source.address, 4096) == (4096, 0)
    assert toucher.has_ended()
    assert toucher.value == 0x10
    assert descriptor.read_faults_nowait() == []


def test_without_a_wake_the_toucher_goes_on_waiting(
    missing: tuple[Mapping, Userfaultfd], source: Mapping
) -> None:
    mapping, descriptor = missing
    toucher = Toucher(mapping, 0)
    wait_for_fault(descriptor)
    assert descriptor.copy(mapping.address, source.address, 4096, wake=False) == (4096, 0)
    assert toucher.value is None
    descriptor.wake(mapping.address, 4096)
    assert toucher.has_ended()
    assert toucher.value == 0x10


def test_a_wake_alone_brings_the_same_fault_again(missing: tuple[Mapping, Userfaultfd]) -> None:
    mapping, descriptor = missing
    toucher = Toucher(mapping, 0)
    first = wait_for_fault(descriptor)
    descriptor.wake(mapping.address, 4096)
    assert wait_for_fault(descriptor).address == first.address
    assert descriptor.zeropage(mapping.address, 4096, wake=False) == (4096, 0)
    descriptor.wake(mapping.address, 4096)
    assert toucher.has_ended()
    assert toucher.value == 0


def test_a_present_page_stops_a_copy_and_is_not_overwritten(
    missing: tuple[Mapping, Userfaultfd], source: Mapping
) -> None:
    mapping, descriptor = missing
    descriptor.copy(mapping.address + 3 * 4096, source.address + 7 * 4096, 4096)
    placed = descriptor.copy(mapping.address, source.address, 8 * 4096)
    assert placed == (3 * 4096, errno.EAGAIN)  # progress and reason, apart
    again = descriptor.copy(mapping.address + placed.bytes_done, source.address, 5 * 4096)
    assert again == (0, errno.EEXIST)
    assert descriptor.zeropage(mapping.address + 3 * 4096, 4096) == (0, errno.EEXIST)
    assert descriptor.copy(mapping.address + 4 * 4096, source.address, 4 * 4096) == (4 * 4096, 0)
    assert mapping.read(3 * 4096, 1) == b"\x17"


@pytest.mark.parametrize(
    ("shift", "length", "expected"),
    [(0, 100, errno.EINVAL), (1, 4096, errno.EINVAL), (0, 0, errno.EINVAL)],
)
def test_a_copy_that_is_not_whole_pages_is_invalid(
    missing: tuple[Mapping, Userfaultfd], source: Mapping, shift: int, length: int, expected: int
) -> None:
    mapping, descriptor = missing
    assert descriptor.copy(mapping.address + shift, source.address, length) == (0, expected)


def test_a_bad_source_and_a_range_of_nobody(
    missing: tuple[Mapping, Userfaultfd], new_mapping: NewMapping
) -> None:
    mapping, descriptor = missing
    assert descriptor.copy(mapping.address, 4096, 4096) == (0, errno.EFAULT)
    other = new_mapping(1, MappingKind.ANONYMOUS)
    assert descriptor.copy(other.address, mapping.address, 4096) == (0, errno.ENOENT)


def test_a_discarded_page_is_missing_again_even_after_a_hole_was_read(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, kind: MappingKind
) -> None:
    mapping = new_mapping(4, kind)
    assert mapping.is_zero(0, 4 * 4096)  # makes pages of zeroes in the file of a memfd
    mapping.fill(0, 4096, 9)
    mapping.discard(0, 4 * 4096)
    descriptor = new_userfaultfd(Features.MISSING_SHMEM)
    descriptor.register(mapping.address, mapping.length, Mode.MISSING)
    for page in range(4):
        toucher = Toucher(mapping, page * 4096)
        assert wait_for_fault(descriptor).address == mapping.address + page * 4096
        assert descriptor.zeropage(mapping.address + page * 4096, 4096) == (4096, 0)
        assert toucher.has_ended()
    mapping.discard(0, 4096)  # and when registered: discarding in postcopy
    toucher = Toucher(mapping, 0)
    wait_for_fault(descriptor)
    descriptor.zeropage(mapping.address, 4096)
    assert toucher.has_ended()


def test_dontneed_alone_would_leave_silent_zeroes_in_a_private_memfd(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd
) -> None:
    """Why discard also punches a hole: the file's page of zeroes is found without a fault."""
    from uffd._native import lib

    mapping = new_mapping(1, MappingKind.MEMFD_PRIVATE)
    assert mapping.is_zero(0, 4096)
    lib.memory_advise(mapping.address, 4096, lib.MADV_DONTNEED)
    descriptor = new_userfaultfd(Features.MISSING_SHMEM)
    descriptor.register(mapping.address, 4096, Mode.MISSING)
    assert Toucher(mapping, 0).has_ended()
    assert descriptor.read_faults_nowait() == []


def test_a_poisoned_page_is_healed_by_a_copy(missing: tuple[Mapping, Userfaultfd], source: Mapping) -> None:
    mapping, descriptor = missing
    if not probe().has(Features.POISON):
        pytest.skip("This kernel's userfaultfd lacks POISON; use Linux 6.6 or newer")
    assert descriptor.poison(mapping.address, 4096) == (4096, 0)
    assert descriptor.copy(mapping.address, source.address, 4096) == (4096, 0)
    assert mapping.read(0, 1) == b"\x10"


def test_a_write_to_a_protected_page_waits(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd, kind: MappingKind
) -> None:
    mapping = new_mapping(2, kind)
    mapping.fill(0, 8192, 1)
    descriptor = new_userfaultfd(WP)
    descriptor.register(mapping.address, 8192, Mode.WP)
    descriptor.protect(mapping.address, 8192)
    writer = threading.Thread(target=mapping.write, args=(4096, b"new"), daemon=True)
    writer.start()
    fault = wait_for_fault(descriptor)
    assert (fault.address & ~4095, fault.is_protected, fault.is_write) == (mapping.address + 4096, True, True)
    assert mapping.read(4096, 3) == b"\1\1\1"
    descriptor.unprotect(mapping.address + 4096, 4096)
    writer.join(DEADLINE_S)
    assert mapping.read(4096, 3) == b"new"


def test_protecting_what_is_not_registered_is_an_error(
    new_mapping: NewMapping, new_userfaultfd: NewUserfaultfd
) -> None:
    mapping = new_mapping(1, MappingKind.ANONYMOUS)
    descriptor = new_userfaultfd(WP)
    with pytest.raises(NotRegistered) as caught:
        descriptor.protect(mapping.address, 4096)
    assert (caught.value.errno, caught.value.address, caught.value.length) == (
        errno.ENOENT,
        mapping.address,
        4096,
    )


def test_missing_and_wp_are_never_armed_at_once(
    missing: tuple[Mapping, Userfaultfd], new_userfaultfd: NewUserfaultfd
) -> None:
    mapping, descriptor = missing
    with pytest.raises(UffdError, match="registered for MISSING"):
        descriptor.register(mapping.address + 4096, 4096, Mode.WP)
    with pytest.raises(AlreadyRegistered):
        new_userfaultfd(WP).register(mapping.address, mapping.length, Mode.WP)


def test_only_what_was_registered_is_unregistered(missing: tuple[Mapping, Userfaultfd]) -> None:
    mapping, descriptor = missing
    with pytest.raises(UffdError, match="not registered here"):
        descriptor.unregister(mapping.address, 4096)


def test_it_does_not_close_while_pages_may_be_missing(missing: tuple[Mapping, Userfaultfd]) -> None:
    mapping, descriptor = missing
    with pytest.raises(UffdError, match="unregister the range first"):
        descriptor.close()
    toucher = Toucher(mapping, 0)
    wait_for_fault(descriptor)  # it still watches
    descriptor.zeropage(mapping.address, 4096)
    assert toucher.has_ended()


def test_a_stray_close_of_the_number_does_not_free_missing_pages(
    missing: tuple[Mapping, Userfaultfd],
) -> None:
    mapping, descriptor = missing
    toucher = Toucher(mapping, 0)
    wait_for_fault(descriptor)
    os.close(descriptor.fd)
    descriptor.fd = descriptor._keeper  # nobody but this test may know it
    descriptor._keeper = -1
    assert toucher.value is None
    descriptor.zeropage(mapping.address, 4096)
    assert toucher.has_ended()


def test_close_twice(new_userfaultfd: NewUserfaultfd) -> None:
    descriptor = new_userfaultfd(Features(0))
    descriptor.close()
    descriptor.close()
    assert descriptor.fd == -1


def test_a_feature_that_no_kernel_has_is_refused_and_leaks_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KernelRefused) as caught:
        Userfaultfd(Features(1 << 62))
    assert caught.value.errno == errno.EINVAL
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_ladder_goes_down_and_names_every_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        userfaultfd,
        "RUNGS",
        (("the first", lambda: -errno.EACCES, False), ("the second", lambda: -errno.EPERM, True)),
    )
    with pytest.raises(UffdUnavailable, match=r"the first: EACCES, .*; the second: EPERM, "):
        Userfaultfd()


@pytest.mark.parametrize("rung", userfaultfd.RUNGS, ids=lambda rung: rung[0])
def test_each_rung_that_is_permitted_gives_a_descriptor(
    rung: tuple[str, Callable[[], int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userfaultfd, "RUNGS", (rung,))
    try:
        descriptor = Userfaultfd(Features.MISSING_SHMEM)
    except UffdUnavailable as error:
        pytest.skip(str(error))
    assert (descriptor.rung, descriptor.user_mode_only) == (rung[0], rung[2])
    assert not os.get_inheritable(descriptor.fd)
    assert not os.get_blocking(descriptor.fd)
    descriptor.close()
