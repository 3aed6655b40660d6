"""Fixtures of the control side's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.requires import requires
from tests.vmm.control.stock import Stock


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[Stock]:
    """A stock QEMU 7.2, not negotiated with."""
    requires("qemu")
    stock = Stock(tmp_path)
    yield stock
    stock.close()
