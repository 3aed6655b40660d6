"""A feed gives each watcher the latest value, once."""

from __future__ import annotations

import asyncio

import pytest

from qmp.http.feed import Feed

pytestmark = pytest.mark.asyncio


async def test_the_latest_value_comes_at_once() -> None:
    feed = Feed()
    feed.publish(b"1")
    feed.publish(b"2")
    assert await feed.next_event(0) == (2, b"data: 2\n\n")


async def test_a_watcher_waits_for_what_it_has_not_seen() -> None:
    feed = Feed()
    watchers = [asyncio.create_task(feed.next_event(0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(watcher.done() for watcher in watchers)
    feed.publish(b"1")
    assert await asyncio.gather(*watchers) == [(1, b"data: 1\n\n")] * 3


@pytest.mark.parametrize("text", [b"a\nb", b"a\r", b"\n"])
async def test_a_value_is_one_line(text: bytes) -> None:
    feed = Feed()
    with pytest.raises(ValueError, match="one line"):
        feed.publish(text)
