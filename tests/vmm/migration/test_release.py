"""release-ram: pages go back when the destination has them, not before, and recovery misses none."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.requires import requires
from vmm.errors import MachineError
from vmm.migration.bitmap import Bitmap
from vmm.migration.errors import MigrationRefused, PeerError
from vmm.migration.release import RamRelease
from vmm.ram import RAMBlock, RamKind

GUEST = "pages=512 beat=16"


class Peer:
    """Fits what RamRelease needs of the sender, the stream and the return path."""

    def __init__(self, block: RAMBlock) -> None:
        self.dirty = {block.name: Bitmap(block.page_count)}
        self.urgent = {block.name: Bitmap(block.page_count)}
        self.pings: list[int] = []
        self.pongs: set[int] = set()
        self.destination_has_started = False

    def ping(self, value: int) -> None:
        self.pings.append(value)

    def take_pong(self, ping: int) -> bool:
        is_answered = ping in self.pongs
        self.pongs.discard(ping)
        return is_answered


@pytest.fixture
def block() -> Any:
    made = RAMBlock("ram", 8 * PAGE)
    made.write(0, b"\x11" * 8 * PAGE)
    yield made
    made.close()


def full(block: RAMBlock) -> list[int]:
    return [page for page in range(8) if block.read(page * PAGE, 1) == b"\x11"]


def test_only_what_was_confirmed_after_the_start_goes_back(block: RAMBlock) -> None:
    peer: Any = Peer(block)
    release = RamRelease([block], peer, is_on=True)
    peer.dirty["ram"].set_range(4, 4)
    release.step(peer, peer)
    assert peer.pings == [], "the guest may still have to run here"
    peer.destination_has_started = True
    release.step(peer, peer)
    peer.dirty["ram"].clear(4)  # sent after the question
    release.step(peer, peer)
    assert len(peer.pings) == 1
    assert len(full(block)) == 8, "not answered yet"
    peer.pongs.add(peer.pings[0])
    release.step(peer, peer)
    assert full(block) == [4, 5, 6, 7]
    assert release.pages == 4
    written = {"ram": Bitmap(8)}
    written["ram"].set_range(2, 4)
    release.without(written)
    assert list(written["ram"].runs()) == [(4, 2)]
    release.step(peer, peer)
    assert len(set(peer.pings)) == 2


def test_a_question_of_the_old_channel_is_not_answered_on_the_new_one(block: RAMBlock) -> None:
    peer: Any = Peer(block)
    peer.destination_has_started = True
    release = RamRelease([block], peer, is_on=True)
    release.step(peer, peer)
    release.new_channel()
    peer.dirty["ram"].set(3)  # was on the wire when it broke
    peer.pongs.add(peer.pings[0])
    release.step(peer, peer)
    peer.pongs.add(peer.pings[1])
    release.step(peer, peer)
    assert full(block) == [3]
    release.check_not_wanted()
    peer.dirty["ram"].set(2)
    with pytest.raises(PeerError, match="1 pages that it had confirmed"):
        release.check_not_wanted()


def test_nothing_without_the_capability(block: RAMBlock) -> None:
    peer: Any = Peer(block)
    peer.destination_has_started = True
    release = RamRelease([block], peer, is_on=False)
    release.step(peer, peer)
    assert peer.pings == []


def fill(source: Side) -> None:
    """2 MiB that the guest never asks for, so that postcopy lasts."""
    source.machine.ram.blocks[0].write(8 * MIB, b"\x77" * (2 * MIB))


def zeroes(side: Side) -> int:
    block = side.machine.ram.blocks[0]
    return sum(block.read(page * PAGE, PAGE) == bytes(PAGE) for page in range(block.page_count))


@pytest.mark.parametrize("kind", list(RamKind))
def test_the_source_is_empty_and_the_guest_is_whole(machines: Sides, kind: RamKind) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST, kind=kind)
    source.capability("release-ram")
    source.wait_heartbeat()
    fill(source)
    before = zeroes(source)
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=MIB // 2)
    release = source.migrator._source._phases.release  # type: ignore[union-attr]  # no command shows it
    until(lambda: release.pages > 64, "pages given back while others are still missing")
    assert destination.received.count() < destination.received.pages
    machines.finish(source, destination)
    assert zeroes(source) > before
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)
    with pytest.raises(MigrationRefused, match="release-ram"):
        source.migrator.take_back()
    with pytest.raises(MachineError, match="handed over"):
        source.machine.cont()


def _more_than(release: RamRelease, before: int) -> bool:
    return release.pages > before


def test_recovery_with_released_pages(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair(append=GUEST)
    source.capability("release-ram")
    source.wait_heartbeat()
    fill(source)
    machines.to_postcopy(source, destination, max_postcopy_bandwidth=MIB // 2)
    release = source.migrator._source._phases.release  # type: ignore[union-attr]  # no command shows it
    for number in range(4):
        before = release.pages
        until(functools.partial(_more_than, release, before), "pages given back")
        since = len(source.events), len(destination.events)
        source.migrator.pause()
        source.wait("postcopy-paused", since=since[0])
        destination.wait("postcopy-paused", since=since[1])
        since = len(source.events), len(destination.events)
        destination.migrator.recover(f"{machines.uri}{number}")
        source.migrator.migrate(f"{machines.uri}{number}", resume=True)
        source.wait("postcopy-active", since=since[0])
        destination.wait("postcopy-active", since=since[1])
    since = len(source.events), len(destination.events)
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    source.wait("completed", since=since[0] - 1)
    destination.wait("completed", since=since[1] - 1)
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)
