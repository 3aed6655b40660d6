"""Fixtures of the tests against stock QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.functional.harness import Stable
from tests.support.requires import requires


@pytest.fixture(autouse=True)
def stock_is_here() -> None:
    """Every test of this directory needs stock QEMU, unless it says otherwise."""
    requires("qemu")


@pytest_asyncio.fixture
async def stable() -> AsyncIterator[Stable]:
    """Starts machines; when the test is over, none is left, whatever happened."""
    async with Stable() as machines:
        yield machines
