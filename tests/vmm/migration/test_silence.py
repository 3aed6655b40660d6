"""The watch itself, and a link that swallows what the source says while its kernel still answers."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.support.real_machines import MIB, Sides, until
from tests.support.relay import Relay
from tests.support.requires import requires
from vmm.migration import channel as channels
from vmm.migration.errors import MigrationError
from vmm.migration.silence import SilenceWatch
from vmm.migration.status import Role
from vmm.migration.uri import parse_uri


def test_silence_is_told_each_time_and_nothing_else_is() -> None:
    told: list[str] = []
    heard: list[int | None] = [None]
    beats: list[int] = []
    watch = SilenceWatch(lambda: heard[0], lambda: 500, told.append, lambda: beats.append(1))
    watch.start()
    try:
        until(lambda: len(beats) >= 4, "beats")
        assert not told, "nothing was expected"
        heard[0] = 1
        until(lambda: told, "silence")
        assert "nothing was heard from it for 5" in told[0]
        until(lambda: len(told) >= 2, "silence again")
    finally:
        watch.stop()
    assert "mig/watch" not in {thread.name for thread in threading.enumerate()}


def test_zero_is_never() -> None:
    told: list[str] = []
    beats: list[int] = []
    watch = SilenceWatch(lambda: 1, lambda: 0, told.append, lambda: beats.append(1))
    watch.start()
    until(lambda: len(beats) >= 4, "beats")
    watch.stop()
    assert not told


def test_the_kernel_gives_up_a_dead_host() -> None:
    """On tcp:, with any peer."""

    def no_fd(name: str) -> int:
        raise MigrationError(name)

    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        channel = channels.connect(parse_uri(uri, Role.SOURCE), no_fd, -1, 8000)
        with socket.socket(fileno=channel.write_fd) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
def test_a_link_that_swallows_one_direction(machines: Sides, way: str) -> None:
    """The destination hears nothing, though the source hears the destination: both end as after a cut."""
    if way == "postcopy":
        requires("uffd")
        source, destination = machines.postcopy_pair(append="pages=128 beat=16")
    else:
        source, destination = machines.pair(append="pages=128 beat=16")
    source.wait_heartbeat()
    destination.migrator.set_parameters({"x-peer-timeout": 1000})
    swallow, go_on = threading.Event(), threading.Event()

    def change(_total: int, data: bytes) -> bytes:
        if swallow.is_set():
            assert go_on.wait(20)
        return data

    relay = Relay(f"{machines.folder}/relay", machines.uri.removeprefix("unix:"), change)
    try:
        source.migrator.set_parameters({"max-bandwidth": MIB // 4, "max-postcopy-bandwidth": 1})
        source.migrator.migrate(f"unix:{machines.folder}/relay")
        destination.wait("active")
        if way == "postcopy":
            source.migrator.start_postcopy()
            destination.wait_event("POSTCOPY_STATE", "running")
        swallow.set()
        end = "failed" if way == "precopy" else "postcopy-paused"
        destination.wait(end)
        assert "The source is silent: nothing was heard from it for 1" in destination.error
        go_on.set()
        source.wait(end)
    finally:
        go_on.set()
        relay.close()
