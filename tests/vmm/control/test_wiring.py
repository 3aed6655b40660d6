"""Events reach the clients in the order in which they happened, whatever thread they happened on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from qmp.events import EventHub
from qmp.schema import Schema
from schema import documents
from tests.vmm.control.fakes import FakeClient, make_vm
from vmm.control import wiring
from vmm.control.wiring import EventForwarder


class Recorder:
    def __init__(self, hub: EventHub) -> None:
        self.events: list[dict[str, Any]] = []
        hub.subscribe(lambda event, line: self.events.append(event))

    async def wait(self, count: int) -> None:
        """Until so many events have come."""
        async with asyncio.timeout(60):
            while len(self.events) < count:
                await asyncio.sleep(0.001)

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
    await recorder.wait(201)
    assert recorder.passes == list(range(201))
    stamps = [event["timestamp"] for event in recorder.events]
    assert [(s["seconds"], s["microseconds"]) for s in stamps] == sorted(
        (s["seconds"], s["microseconds"]) for s in stamps
    )


@pytest.mark.asyncio
async def test_events_soon_after_one_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop looks once for them, and goes to sleep when none has come; a later one wakes it again."""
    monkeypatch.setattr(wiring, "BUNCH_S", 0.2)
    hub = EventHub(Schema(documents()))
    recorder = Recorder(hub)
    forward = EventForwarder(hub, asyncio.get_running_loop())
    await asyncio.to_thread(forward, "STOP", {})
    await recorder.wait(1)
    await asyncio.to_thread(forward, "RESUME", {})
    await asyncio.to_thread(forward, "STOP", {})
    assert len(recorder.events) == 1
    await recorder.wait(3)
    while forward._is_looking:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(forward, "RESUME", {})
    await recorder.wait(4)
    assert [event["event"] for event in recorder.events] == ["STOP", "RESUME"] * 2


@pytest.mark.asyncio
async def test_a_hold_ends_with_a_reply_or_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "HOLD_S", 0.2)
    hub = EventHub(Schema(documents()))
    recorder = Recorder(hub)
    forward = EventForwarder(hub, asyncio.get_running_loop())
    await asyncio.to_thread(forward.hold)
    await asyncio.to_thread(forward, "STOP", {})
    await asyncio.sleep(0)
    assert recorder.events == []
    forward.deliver()
    assert len(recorder.events) == 1, "who gets a reply has heard of all that was before it"
    await asyncio.to_thread(forward, "RESUME", {})
    await asyncio.sleep(0)
    assert len(recorder.events) == 1
    await recorder.wait(2)


@pytest.mark.asyncio
async def test_events_go_on_after_a_listener_that_raises() -> None:
    hub = EventHub(Schema(documents()))
    forward = EventForwarder(hub, asyncio.get_running_loop())

    def fail(event: dict[str, Any], line: bytes) -> None:
        unsubscribe()
        raise RuntimeError("expected by the test")

    unsubscribe = hub.subscribe(fail)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    await asyncio.to_thread(forward, "STOP", {})
    async with asyncio.timeout(20):
        while fail in hub._listeners:
            await asyncio.sleep(0.001)
    recorder = Recorder(hub)
    await asyncio.to_thread(forward, "RESUME", {})
    await recorder.wait(1)


@pytest.mark.asyncio
async def test_an_event_of_a_command_comes_after_those_before_it() -> None:
    vm = make_vm(asyncio.get_running_loop())
    recorder = Recorder(vm.control.hub)
    await asyncio.to_thread(vm.control.notify.hold)
    client = FakeClient(vm.control)
    client.negotiate()
    await asyncio.to_thread(vm.control.notify, "STOP", {})
    await asyncio.to_thread(vm.control.notify, "RESUME", {})
    await asyncio.sleep(0)
    assert recorder.events == []
    client.say(b'{"execute":"system_powerdown"}')
    assert [event["event"] for event in recorder.events] == ["STOP", "RESUME", "POWERDOWN"]


def test_an_event_after_the_loop_is_no_error() -> None:
    loop = asyncio.new_event_loop()
    forward = EventForwarder(EventHub(Schema(documents())), loop)
    loop.close()
    thread = threading.Thread(target=forward, args=("STOP", {}))
    thread.start()
    thread.join()
    forward.hold()


def test_unknown_events_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub(Schema(documents()), clock=lambda: 12.25)
    recorder = Recorder(hub)
    hub.emit("NO_SUCH_EVENT")
    hub.emit("STOP", {})
    assert "NO_SUCH_EVENT" in caplog.text
    assert recorder.events == [{"timestamp": {"seconds": 12, "microseconds": 250000}, "event": "STOP"}]
