"""What this kernel lets this user do, found out by doing it on two pages. Never by version numbers.

Each `why_no_x` is None, or one sentence that ends in the cure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

from uffd._native import PAGE_SIZE_BYTES, ffi, lib
from uffd.errors import UffdError, UffdUnavailable, refused
from uffd.mapping import Mapping, MappingKind
from uffd.pagemap import PagemapScanner
from uffd.userfaultfd import Features, Mode, Userfaultfd, open_raw

__all__ = ["Probe", "probe"]

NOT_PERMITTED = (
    "userfaultfd is not to be had ({}); run as root, or give this user access to /dev/userfaultfd, or set "
    "sysctl vm.unprivileged_userfaultfd=1; in a container also allow userfaultfd in its seccomp profile"
)
NOT_IN_KERNEL = "userfaultfd is not in this kernel ({}); use one built with CONFIG_USERFAULTFD"
TOO_OLD = "This kernel's userfaultfd lacks {}; use Linux {} or newer"


@dataclasses.dataclass(frozen=True)
class Probe:
    """The findings.

    `features` is the kernel's whole mask, also bits that `Features` has no name for. `privileged` means
    that faults inside of system calls are handled too, `user_mode_only` that they end in EFAULT there;
    both are False if there is no userfaultfd. `opened_by` is the way in that worked.
    """

    features: int
    privileged: bool
    user_mode_only: bool
    opened_by: str | None
    why_no_missing: str | None
    why_no_wp_async: str | None
    why_no_wp_sync: str | None

    def has(self, features: Features) -> bool:
        """Whether the kernel has all of `features`."""
        return self.features & features == features


@functools.cache
def probe() -> Probe:
    """Find out once for a process; `probe.cache_clear()` makes the next call look again."""
    try:
        opened = open_raw()
    except UffdUnavailable as error:
        text = NOT_IN_KERNEL if "ENOSYS" in str(error) else NOT_PERMITTED
        why = text.format(error)
        return Probe(0, False, False, None, why, why, why)
    mask = ffi.new("uint64_t *")
    result = lib.uffd_handshake(opened.fd, 0, mask)
    lib.uffd_close(opened.fd)
    if result < 0:
        why = NOT_IN_KERNEL.format(refused("UFFDIO_API", -result))
        return Probe(0, False, False, None, why, why, why)
    return Probe(
        features=mask[0],
        privileged=not opened.user_mode_only,
        user_mode_only=opened.user_mode_only,
        opened_by=opened.rung,
        why_no_missing=_why_no_missing(mask[0]),
        why_no_wp_async=_why_no_wp_async(mask[0]),
        why_no_wp_sync=_why_no_wp_sync(mask[0]),
    )


def _lacks(mask: int, feature: Features, since: str) -> str | None:
    return None if mask & feature else TOO_OLD.format(feature.name, since)


def _why_no_missing(mask: int) -> str | None:
    return _lacks(mask, Features.MISSING_SHMEM, "4.11") or _try(_place_one_page)


def _why_no_wp_async(mask: int) -> str | None:
    return _lacks(mask, Features.WP_ASYNC, "6.7") or _try(_scan_one_page)


def _why_no_wp_sync(mask: int) -> str | None:
    return (
        _lacks(mask, Features.PAGEFAULT_FLAG_WP, "5.7")
        or _lacks(mask, Features.WP_HUGETLBFS_SHMEM, "5.19")
        or _try(_protect_one_page)
    )


def _try(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except UffdError as error:
        return f"{attempt.__doc__} failed ({error}); use another kernel, or a seccomp profile that allows it"
    return None


def _place_one_page() -> None:
    """Placing a missing page"""
    with _pages() as mapping, _opened(Features.MISSING_SHMEM, mapping, Mode.MISSING) as userfaultfd:
        placed = userfaultfd.zeropage(mapping.address, PAGE_SIZE_BYTES)
        if placed.errno:
            raise refused("UFFDIO_ZEROPAGE", placed.errno, mapping.address, PAGE_SIZE_BYTES)


def _protect_one_page() -> None:
    """Write-protecting a page"""
    features = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
    with _pages() as mapping, _opened(features, mapping, Mode.WP) as userfaultfd:
        userfaultfd.protect(mapping.address, PAGE_SIZE_BYTES)


def _scan_one_page() -> None:
    """Scanning for written pages (PAGEMAP_SCAN)"""
    with _pages() as mapping, _opened(Features.WP_ASYNC, mapping, Mode.WP):
        scanner = PagemapScanner()
        bits = ffi.new("uint64_t *")
        try:
            mapping.fill(0, 1, 1)
            scanner.take_written(mapping.address, mapping.length, int(ffi.cast("uintptr_t", bits)))
            if bits[0] != 1:
                raise UffdError(f"expected page 0 as written, got bits {bits[0]:#x}")
        finally:
            scanner.close()


@contextlib.contextmanager
def _pages() -> Iterator[Mapping]:
    mapping = Mapping(2 * PAGE_SIZE_BYTES, MappingKind.MEMFD_SHARED, name="probe")
    try:
        yield mapping
    finally:
        mapping.close()


@contextlib.contextmanager
def _opened(features: Features, mapping: Mapping, mode: Mode) -> Iterator[Userfaultfd]:
    userfaultfd = Userfaultfd(features)
    try:
        userfaultfd.register(mapping.address, mapping.length, mode)
        yield userfaultfd
        userfaultfd.unregister(mapping.address, mapping.length)
    finally:
        userfaultfd.registered.clear()  # two pages of a probe: nothing to be lost
        userfaultfd.close()
