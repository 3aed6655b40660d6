"""Strangers at the address of migrate-recover: none is let in, keeps the source out or leaves a page."""

from __future__ import annotations

import socket

import pytest

from tests.support.real_machines import Side, Sides, until
from tests.support.requires import requires
from vmm.migration import commands, recovery_door
from vmm.migration.errors import MigrationRefused
from vmm.migration.ram_records import EndOfBody, Page, RamWriter
from vmm.migration.stream import EndOfStream, Header, SectionFooter, SectionPart, encode
from vmm.run_state import RunState


def a_page() -> bytes:
    """A section with a page that a stranger would like the guest to have."""
    ram = RamWriter()
    body = ram.write(Page("microvm.ram", 0x5000, b"\xee" * 4096)) + ram.write(EndOfBody())
    return encode(SectionPart(2)) + body + encode(SectionFooter(2))


STRANGERS: dict[str, bytes] = {
    "nothing": b"",
    "a web browser": b"GET / HTTP/1.1\r\n\r\n",
    "another source": encode(Header()),
    "half a command": encode(commands.RecvBitmap("microvm.ram"))[:4],
    "no name, but a map": encode(commands.RecvBitmap("microvm.ram")),
    "no name, but RESUME": encode(commands.PostcopyResume()),
    "another name": encode(commands.Ask(b"x" * 16)) + encode(commands.PostcopyResume()),
    "pages after another name": encode(commands.Ask(b"x" * 16)) + a_page(),
    "the end after another name": encode(commands.Ask(b"x" * 16)) + encode(EndOfStream()),
    "an order to start": encode(commands.Start()),
    "a package": encode(commands.Packaged(b"\0" * 10)),
    "a command that there is not": b"\x08\x77\x77\0\0",
}


def paused(machines: Sides) -> tuple[Side, Side]:
    requires("uffd")
    source, destination = machines.postcopy_pair(append="pages=256 beat=16")
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=1)
    source.migrator.pause()
    source.wait("postcopy-paused")
    destination.wait("postcopy-paused")
    return source, destination


def say(path: str, words: bytes) -> None:
    """Until the destination has had enough."""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(path)
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(60)
        try:
            while stranger.recv(4096):
                pass
        except ConnectionResetError:
            pass


def test_strangers(machines: Sides) -> None:
    source, destination = paused(machines)
    missing = destination.migrator.query()["x-missing"]["pages"]
    target = f"{machines.uri}-again"
    destination.migrator.recover(target)
    for who, words in STRANGERS.items():
        say(target.removeprefix("unix:"), words)
        until(lambda: destination.status == "postcopy-paused", who)
        assert destination.migrator.query()["x-missing"]["pages"] == missing, who
    since = len(source.events), len(destination.events)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    source.migrator.migrate(target, resume=True)
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def test_one_that_says_nothing(machines: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is turned away in time; a source that waits behind it is served."""
    monkeypatch.setattr(recovery_door, "HANDSHAKE_MS", 50)
    source, destination = paused(machines)
    target = f"{machines.uri}-again"
    destination.migrator.recover(target)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(target.removeprefix("unix:"))
        source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
        source.migrator.migrate(target, resume=True)
        until(lambda: source.status == "completed", "the end")
        until(lambda: destination.status == "completed", "the end")


def test_a_better_address(machines: Sides) -> None:
    """A second migrate-recover takes the place of the first, also at the same address."""
    source, destination = paused(machines)
    for _ in range(3):
        destination.migrator.recover(f"{machines.uri}-again")
    assert destination.migrator.query()["socket-address"] == [
        {"type": "unix", "path": f"{machines.uri}-again".removeprefix("unix:")}
    ]
    with pytest.raises(MigrationRefused, match="two-way"):
        source.migrator.migrate("exec:cat", resume=True)
    with pytest.raises(MigrationRefused, match="two-way"):
        source.migrator.migrate(f"file:{machines.folder}/file", resume=True)
    since = len(source.events)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    source.migrator.migrate(f"{machines.uri}-nobody", resume=True)
    until(lambda: "Failed to connect" in source.error, "an error")
    assert source.status == "postcopy-paused"
    source.migrator.migrate(f"{machines.uri}-again", resume=True)
    source.wait("completed", since=since)
    until(lambda: destination.status == "completed", "the end")


def test_refusals(machines: Sides) -> None:
    """QEMU's texts."""
    source, destination = machines.pair(append="pages=64 beat=16")
    for side in (source, destination):
        with pytest.raises(MigrationRefused, match="only be run when postcopy is paused"):
            side.migrator.recover(f"{machines.uri}-again")
        with pytest.raises(MigrationRefused, match="only supported during postcopy-active state"):
            side.migrator.pause()
        with pytest.raises(MigrationRefused, match="Cannot resume if there is no paused migration"):
            side.migrator.migrate(machines.uri, resume=True)
        with pytest.raises(MigrationRefused, match="was not handed over"):
            side.migrator.take_back()
    assert source.machine.run_state is RunState.RUNNING
