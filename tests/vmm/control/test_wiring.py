"""Events reach the clients in the order in which they happened, whatever thread they happened on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from qmp.events import EventHub
from qmp.schema import Schema
from schema import documents
from vmm.control.wiring import EventForwarder


class Recorder:
    def __init__(self, hub: EventHub) -> None:
        self.events: list[dict[str, Any]] = []
        hub.subscribe(lambda event, line: self.events.append(event))

    @property
    def passes(self) -> list[int]:
        return [event["data"]["pass"] for event in self.events]


@pytest.mark.asyncio
async def test_order_is_kept_between_threads_and_within_one() -> None:
    hub = EventHub(Schema(documents()))
    recorder = Recorder(hub)
    forward = EventForwarder(hub, asyncio.get_running_loop())

    def other_thread(first: int) -> None:
        for number in range(first, first + 100):
            forward("MIGRATION_PASS", {"pass": number})

    thread = threading.Thread(target=other_thread, args=(0,))
    thread.start()
    thread.join()
    assert recorder.events == []
    # On the loop's thread: at once, and after those that wait.
    forward("MIGRATION_PASS", {"pass": 100})
    assert recorder.passes == list(range(101))
    await asyncio.to_thread(other_thread, 101)
    await asyncio.sleep(0)
    assert recorder.passes == list(range(201))
    stamps = [event["timestamp"] for event in recorder.events]
    assert [(s["seconds"], s["microseconds"]) for s in stamps] == sorted(
        (s["seconds"], s["microseconds"]) for s in stamps
    )


def test_an_event_after_the_loop_is_no_error() -> None:
    loop = asyncio.new_event_loop()
    forward = EventForwarder(EventHub(Schema(documents())), loop)
    loop.close()
    thread = threading.Thread(target=forward, args=("STOP", {}))
    thread.start()
    thread.join()


def test_unknown_events_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub(Schema(documents()), clock=lambda: 12.25)
    recorder = Recorder(hub)
    hub.emit("NO_SUCH_EVENT")
    hub.emit("STOP", {})
    assert "NO_SUCH_EVENT" in caplog.text
    assert recorder.events == [{"timestamp": {"seconds": 12, "microseconds": 250000}, "event": "STOP"}]
