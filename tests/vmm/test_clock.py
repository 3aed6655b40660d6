"""The virtual clock: passes only while it runs, and travels."""

from __future__ import annotations

from vmm.clock import VirtualClock


class Host:
    """A host clock that somebody turns by hand."""

    now = 1_000_000

    def __call__(self) -> int:
        return self.now


def test_it_passes_only_while_it_runs() -> None:
    host = Host()
    clock = VirtualClock(host)
    host.now += 5
    assert clock.now_ns() == 0
    for _ in range(2):  # a second start or stop changes nothing
        clock.start()
    host.now += 7
    assert clock.now_ns() == 7
    for _ in range(2):
        clock.stop()
    host.now += 100
    assert (clock.now_ns(), clock.offset) == (7, 7)
    clock.start()
    host.now += 1
    assert clock.now_ns() == 8


def test_it_goes_on_elsewhere() -> None:
    host = Host()
    clock = VirtualClock(host)
    clock.offset = 123
    clock.start()
    host.now += 1
    assert clock.now_ns() == 124
