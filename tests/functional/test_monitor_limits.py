"""What many or malicious clients may cost: the drills of tools/qmp_limits.py, held to bounds.

The bounds are far above what is measured on an idle machine (`python -m tools.qmp_limits`): here they must
hold beside whatever else runs.
"""

from __future__ import annotations

import pytest

from tools.qmp_limits import (
    Figures,
    big_message,
    drill,
    endless_garbage,
    many_clients,
    many_descriptors,
    raise_descriptor_limit,
    stalled_readers,
)

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

LATENCY_P99_MS = 200.0


def check_neighbour(figures: Figures) -> None:
    """Of the client that meant no harm."""
    assert figures["latency_p99_ms"] < LATENCY_P99_MS, figures


async def test_a_thousand_clients() -> None:
    raise_descriptor_limit()
    figures = await drill(lambda target: many_clients(target, 1000, 100))
    assert figures["kilobytes_a_client"] < 16, figures
    assert figures["growth_mb"] < 40, figures
    assert figures["commands_per_s"] > 2000, figures
    assert figures["latency_max_ms"] < 1000, figures


async def test_a_hundred_that_never_read() -> None:
    figures = await drill(lambda target: stalled_readers(target, 100, 2000))
    assert figures["growth_mb"] < 32, figures
    check_neighbour(figures)


async def test_a_hundred_thousand_descriptors() -> None:
    figures = await drill(many_descriptors)
    assert figures["left_open"] == 0, figures
    assert figures["most_open"] < 64 + 16 + 16, figures
    check_neighbour(figures)


@pytest.mark.parametrize("pattern", [b"[", b"}", b"\xff\x00"])
async def test_garbage_without_an_end(pattern: bytes) -> None:
    figures = await drill(lambda target: endless_garbage(target, pattern))
    assert figures["replies"] == 1, figures
    assert figures["megabytes_taken"] < 20, figures
    assert figures["growth_mb"] < 16, figures
    check_neighbour(figures)


async def test_the_longest_message() -> None:
    figures = await drill(big_message)
    assert figures["growth_mb"] < 100, figures
    assert figures["took_s"] < 5, figures
