"""uffd/probe.py: reasons that end in a cure."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

import pytest

from uffd import Features, Probe, pagemap, probe, userfaultfd
from uffd._native import lib

PROBE_MODULE = sys.modules["uffd.probe"]
"""The package has a function of this name."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    probe.cache_clear()
    yield
    probe.cache_clear()


class FakeKernel:
    """The C module on a kernel with other features; everything else is the real one."""

    def __init__(self, mask: int, handshake_error: int = 0) -> None:
        self.mask, self.handshake_error = mask, handshake_error

    def uffd_handshake(self, _fd: int, wanted: int, mask: list[int]) -> int:
        if self.handshake_error or wanted & ~self.mask:
            return -(self.handshake_error or errno.EINVAL)
        mask[0] = self.mask
        return 0

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


def test_it_is_found_out_once_and_is_consistent() -> None:
    found = probe()
    assert probe() is found
    assert found.privileged != found.user_mode_only or found.opened_by is None
    if found.why_no_wp_async is None:
        assert found.has(Features.WP_ASYNC | Features.WP_UNPOPULATED)


def test_none_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "RUNGS", (("the only one", lambda: -errno.EPERM, False),))
    found = probe()
    assert isinstance(found, Probe)
    assert found.opened_by is None
    assert not found.privileged
    for why in (found.why_no_missing, found.why_no_wp_async, found.why_no_wp_sync):
        assert why is not None
        assert "the only one: EPERM" in why
        assert "sysctl vm.unprivileged_userfaultfd=1" in why


def test_none_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "RUNGS", (("the only one", lambda: -errno.ENOSYS, False),))
    assert "CONFIG_USERFAULTFD" in str(probe().why_no_missing)


@pytest.mark.parametrize(
    ("mask", "missing", "sync", "asynchronous"),
    [
        (0, "Linux 4.11", "Linux 5.7", "Linux 6.7"),
        (Features.MISSING_SHMEM | Features.PAGEFAULT_FLAG_WP, "", "Linux 5.19", "Linux 6.7"),
    ],
)
def test_old_kernels_are_told_from_which_one_on(
    monkeypatch: pytest.MonkeyPatch, mask: int, missing: str, sync: str, asynchronous: str
) -> None:
    if probe().why_no_missing:
        pytest.skip(str(probe().why_no_missing))
    probe.cache_clear()
    monkeypatch.setattr(PROBE_MODULE, "lib", FakeKernel(mask))
    found = probe()
    assert missing in (found.why_no_missing or "")
    assert sync in str(found.why_no_wp_sync)
    assert asynchronous in str(found.why_no_wp_async)


def test_a_failed_handshake_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if probe().why_no_missing:
        pytest.skip(str(probe().why_no_missing))
    probe.cache_clear()
    monkeypatch.setattr(PROBE_MODULE, "lib", FakeKernel(0, errno.EINVAL))
    assert "UFFDIO_API" in str(probe().why_no_missing)


def test_a_feature_that_is_there_but_does_not_work_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if probe().why_no_wp_async:
        pytest.skip(str(probe().why_no_wp_async))
    probe.cache_clear()

    class NoScan(FakeKernel):
        """A kernel where the scan finds nothing."""

        def pagemap_scan(self, *_: int) -> int:
            return 0

    monkeypatch.setattr(pagemap, "lib", NoScan(0))
    found = probe()
    assert "PAGEMAP_SCAN) failed (expected page 0 as written" in str(found.why_no_wp_async)
    assert found.why_no_missing is None
