"""Skips with a reason, and failures in place of skips where a feature was promised.

`PAGEFERRY_REQUIRE=qemu,uffd,wp_async,apt` says what this machine must have: a test that would be
skipped for want of one of these fails there instead, so that a missing package can hide nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest


def _missing_qemu() -> str | None:
    if shutil.which("qemu-system-x86_64") is None:
        return "stock QEMU is not installed (apt-get install qemu-system-x86)"
    return None


def _missing_apt() -> str | None:
    if shutil.which("apt-get") is None:
        return "apt-get is not here"
    return None


def _missing_linux() -> str | None:
    from tools import linux_images

    try:
        linux_images.kernel()
        linux_images.busybox()
    except linux_images.ImagesMissing as error:
        return str(error)
    return None


def _missing_uffd() -> str | None:
    import uffd

    return uffd.probe().why_no_missing


def _missing_wp_async() -> str | None:
    import uffd

    return uffd.probe().why_no_wp_async


def _missing_chromium() -> str | None:
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install chromium chromium-driver)"
    return None


PROBES: dict[str, Callable[[], str | None]] = {
    "qemu": _missing_qemu,
    "apt": _missing_apt,
    "linux": _missing_linux,
    "chromium": _missing_chromium,
    "uffd": _missing_uffd,
    "wp_async": _missing_wp_async,
}
"""Feature -> a probe that gives the reason why it is missing, or None."""


def requires(feature: str) -> None:
    """Skip the calling test if `feature` is missing; fail it if PAGEFERRY_REQUIRE names it."""
    reason = PROBES[feature]()
    if reason is None:
        return
    if feature in os.environ.get("PAGEFERRY_REQUIRE", "").split(","):
        pytest.fail(f"{feature} is required here: {reason}")
    pytest.skip(reason)
