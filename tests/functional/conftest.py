"""Fixtures of the functional tests, by the machines' stage of life."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.functional.harness import Stable


@pytest_asyncio.fixture
async def stable() -> AsyncIterator[Stable]:
    """Starts machines; when the test is over, none is left, whatever happened."""
    machines = Stable()
    try:
        yield machines
        await machines.close()
    finally:
        machines.kill()
