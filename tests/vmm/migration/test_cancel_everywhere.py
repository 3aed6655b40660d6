"""migrate_cancel in every state: the guest stays at the source, or the reply says what to do instead."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.real_machines import Side, Sides, until
from tests.support.requires import requires
from vmm.migration import source_hand_over
from vmm.migration.errors import MigrationRefused
from vmm.migration.loader import Loader
from vmm.run_state import RunState

GUEST = "pages=128 beat=16"


def check_cancelled(source: Side) -> None:
    """At once, and the guest has not noticed."""
    source.migrator.cancel()
    source.migrator.cancel()  # twice is once
    source.wait("cancelled")
    assert source.machine.run_state is RunState.RUNNING
    assert source.machine.cont_guard() is None
    source.wait_heartbeat(2)
    assert source.verdict().is_good, source.verdict()


def running(machines: Sides) -> Side:
    source = machines.make(append=GUEST)
    source.wait_heartbeat()
    return source


def test_while_a_name_is_resolved(machines: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def slow(host: Any, *arguments: Any, **options: Any) -> Any:
        if options:
            return real(host, *arguments, **options)  # is it a number?
        asked.set()
        answer.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    source = running(machines)
    source.migrator.migrate("tcp:host.invalid:4444")
    assert asked.wait(20)
    check_cancelled(source)
    answer.set()


@contextlib.contextmanager
def nobody_accepts() -> Iterator[int]:
    """A port whose backlog is full: who connects waits for an answer."""
    with contextlib.ExitStack() as ends:
        listener = ends.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = ends.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_while_it_connects(machines: Sides) -> None:
    source = running(machines)
    with nobody_accepts() as port:
        source.migrator.migrate(f"tcp:127.0.0.1:{port}")
        source.wait("setup")
        check_cancelled(source)


def test_while_a_command_does_not_read(machines: Sides) -> None:
    source = running(machines)
    source.migrator.migrate("exec:sleep 1000")
    source.wait("active")
    check_cancelled(source)


def test_while_a_command_does_not_end(machines: Sides) -> None:
    """All is written, and the guest is stopped."""
    source = running(machines)
    source.migrator.migrate("exec:cat >/dev/null; sleep 1000")
    source.wait_event("STOP")
    check_cancelled(source)


def test_in_precopy(machines: Sides) -> None:
    source, destination = machines.pair(append=GUEST)
    source.wait_heartbeat()
    source.migrator.set_parameters({"max-bandwidth": 1})
    source.migrator.migrate(machines.uri)
    source.wait("active")
    check_cancelled(source)
    destination.wait("failed")


def test_before_the_switchover(machines: Sides) -> None:
    source, destination = machines.pair(append=GUEST)
    source.wait_heartbeat()
    source.capability("pause-before-switchover")
    source.migrator.migrate(machines.uri)
    source.wait("pre-switchover")
    check_cancelled(source)
    destination.wait("failed")


def hold_loaded(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The destination takes its time before it says that it has loaded the guest. Set: it goes on."""
    released = threading.Event()
    real = Loader.await_start

    def held(self: Loader, outcome: Any) -> None:
        released.wait(20)
        real(self, outcome)

    monkeypatch.setattr(Loader, "await_start", held)
    return released


@pytest.mark.parametrize("by", ["precopy", "postcopy"])
def test_while_the_destination_loads(machines: Sides, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The guest is stopped, everything it needs is on its way, and it is still the source's."""
    released = hold_loaded(monkeypatch)
    if by == "postcopy":
        requires("uffd")
        source, destination = machines.postcopy_pair(append=GUEST)
        source.migrator.set_parameters({"max-bandwidth": 1, "downtime-limit": 0})
    else:
        source, destination = machines.pair(append=GUEST)
    source.wait_heartbeat()
    source.migrator.migrate(machines.uri)
    if by == "postcopy":
        source.migrator.start_postcopy()
        destination.wait_event("POSTCOPY_STATE", "listening")
    else:
        source.wait_event("STOP")
    check_cancelled(source)
    released.set()
    destination.wait("failed")
    assert destination.machine.run_state is RunState.INMIGRATE
    assert destination.serial.text == ""


def test_in_postcopy_and_paused(machines: Sides) -> None:
    """The guest is the destination's: what can be done is in the text."""
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=1)
    for status in ("postcopy-active", "postcopy-paused"):
        until(lambda status=status: source.status == status, status)  # type: ignore[misc]  # bound as a default
        with pytest.raises(MigrationRefused, match=r"cannot cancel.*migrate-recover there.*resume here"):
            source.migrator.cancel()
        if status == "postcopy-active":
            source.migrator.pause()
    destination.wait("postcopy-paused")


def test_a_connection_of_a_recovery_that_hangs_gives_way_to_a_better_one(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=1)
    source.migrator.pause()
    source.wait("postcopy-paused")
    destination.wait("postcopy-paused")
    since = len(source.events), len(destination.events)
    with nobody_accepts() as port:
        source.migrator.migrate(f"tcp:127.0.0.1:{port}", resume=True)
        source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
        destination.migrator.recover(machines.uri + "2")
        source.migrator.migrate(machines.uri + "2", resume=True)
        source.wait("completed", since=since[0])
        destination.wait("completed", since=since[1])


def test_a_stock_destination_that_loads_cannot_be_asked(
    machines: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its protocol has no step between loading and starting: with the last record the guest is its own."""
    monkeypatch.setattr(source_hand_over, "INTRODUCTION_S", 0.05)
    source = running(machines)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(machines.uri.removeprefix("unix:"))
        listener.listen(1)
        source.migrator.migrate(machines.uri)
        peer, _ = listener.accept()
        with peer, peer.makefile("rb") as stream:
            while stream.peek()[-1:] != b"}":
                stream.read1()
            with pytest.raises(MigrationRefused, match="cannot cancel"):
                source.migrator.cancel()
    source.wait("failed")
    assert source.machine.run_state is RunState.POSTMIGRATE
