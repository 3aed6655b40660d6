"""The page maps against plainer models: sets of pages, and a dictionary of states."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmm.migration.errors import IllegalPageMove
from vmm.migration.pages import DestinationMaps, PageState, SourceMaps, discard_commands, mask, ranges

COUNTS = {"ram": 20, "rom": 3}
BLOCKS = st.sampled_from(list(COUNTS))
Place = tuple[str, int]
EVERY = {(block, page) for block, count in COUNTS.items() for page in range(count)}
PLACES = st.sampled_from(sorted(EVERY))


def as_set(maps: dict[str, int]) -> set[Place]:
    return {
        (block, page) for block, bits in maps.items() for page in range(bits.bit_length()) if bits >> page & 1
    }


@given(st.sets(st.integers(0, 300)))
def test_ranges_are_the_runs_of_set_bits(pages: set[int]) -> None:
    found = list(ranges(sum(1 << page for page in pages)))
    assert {page for first, count in found for page in range(first, first + count)} == pages
    assert found == sorted(found)
    for (first, count), (after, _) in itertools.pairwise(found):
        assert first + count < after, "two runs touch"


@given(st.sets(st.integers(0, 300)))
def test_discard_commands_cover_exactly_what_is_stale(pages: set[int]) -> None:
    commands = list(discard_commands("ram", sum(1 << page for page in pages)))
    covered = [
        page
        for command in commands
        for start, length in command.ranges
        for page in range(start // 4096, (start + length) // 4096)
    ]
    assert covered == sorted(pages)
    for command in commands:
        assert command.encode()
    assert all(len(command.ranges) == 12 for command in commands[:-1])


def test_mask() -> None:
    assert mask(3, 2) == 0b11000
    assert mask(0, 0) == 0


class SourceAgainstSets(RuleBasedStateMachine):
    """SourceMaps beside a set of dirty pages and a list of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = SourceMaps(COUNTS)
        self.dirty = set(EVERY)
        self.sent: set[Place] = set()
        self.requests: list[Place] = []
        self.order = sorted(EVERY, key=lambda place: (list(COUNTS).index(place[0]), place[1]))
        self.last = len(self.order) - 1

    @rule(place=PLACES)
    def guest_writes(self, place: Place) -> None:
        assert self.maps.mark_dirty(*place) == (place not in self.dirty)
        self.dirty.add(place)

    @rule(place=PLACES)
    def destination_requests(self, place: Place) -> None:
        self.maps.request(*place)
        if place not in self.requests:
            self.requests.append(place)

    @rule()
    def send_next(self) -> None:
        expected: tuple[str, int, bool] | None = None
        while self.requests and expected is None:
            place = self.requests.pop(0)
            if place in self.dirty:
                expected = (*place, True)
        if expected is None:
            behind = self.order[self.last + 1 :] + self.order[: self.last + 1]
            following = [place for place in behind if place in self.dirty]
            expected = (*following[0], False) if following else None
        assert self.maps.next_page() == expected
        if expected is not None:
            place = expected[:2]
            self.dirty.remove(place)
            self.sent.add(place)
            self.last = self.order.index(place)

    @rule()
    def start_postcopy(self) -> None:
        stale = self.maps.start_postcopy()
        assert as_set(stale) == self.dirty
        self.sent &= self.dirty

    @rule(received=st.sets(PLACES))
    def recover(self, received: set[Place]) -> None:
        maps = dict.fromkeys(COUNTS, 0)
        for block, page in received:
            maps[block] |= 1 << page
        self.maps.resume(maps)
        self.dirty = EVERY - received
        self.requests = []

    @invariant()
    def maps_agree(self) -> None:
        assert as_set(self.maps.dirty) == self.dirty
        assert as_set(self.maps.sent) == self.sent
        assert self.maps.dirty_count == len(self.dirty)


TestSourceAgainstSets = SourceAgainstSets.TestCase


class DestinationAgainstStates(RuleBasedStateMachine):
    """DestinationMaps beside a dictionary page -> state."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = DestinationMaps(COUNTS)
        self.states = dict.fromkeys(EVERY, PageState.MISSING)
        self.is_listening = False

    def place(self, place: Place, state: PageState) -> None:
        self.states[place] = state

    @rule(place=PLACES)
    def page_arrives(self, place: Place) -> None:
        before = self.states[place]
        if self.is_listening and before is PageState.RECEIVED:
            with pytest.raises(IllegalPageMove) as caught:
                self.maps.receive(*place)
            assert (caught.value.block, caught.value.page) == place
        else:
            assert self.maps.receive(*place) == (before is PageState.REQUESTED)
            self.states[place] = PageState.RECEIVED

    @rule(place=PLACES)
    def page_fault(self, place: Place) -> None:
        if not self.is_listening:
            with pytest.raises(IllegalPageMove):
                self.maps.fault(*place)
        else:
            assert self.maps.fault(*place) == (self.states[place] is PageState.MISSING)
            if self.states[place] is PageState.MISSING:
                self.states[place] = PageState.REQUESTED

    @rule(block=BLOCKS, data=st.data())
    def discard(self, block: str, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, COUNTS[block] - 1))
        count = data.draw(st.integers(1, COUNTS[block] - first))
        if self.is_listening:
            with pytest.raises(IllegalPageMove):
                self.maps.discard(block, first, count)
        else:
            self.maps.discard(block, first, count)
            for page in range(first, first + count):
                self.states[block, page] = PageState.MISSING

    @precondition(lambda self: not self.is_listening)
    @rule()
    def listen(self) -> None:
        self.maps.listen()
        self.is_listening = True

    @invariant()
    def each_page_is_in_its_state(self) -> None:
        assert {place: self.maps.state(*place) for place in EVERY} == self.states
        for block in COUNTS:
            assert not self.maps.received[block] & self.maps.requested[block]
        requested = {place for place, state in self.states.items() if state is PageState.REQUESTED}
        assert set(self.maps.pending_requests()) == requested
        received = sum(state is PageState.RECEIVED for state in self.states.values())
        assert sum(self.maps.missing_counts.values()) == len(EVERY) - received


TestDestinationAgainstStates = DestinationAgainstStates.TestCase


def test_two_ends_meet_whatever_is_asked() -> None:
    """Postcopy in small: every page arrives once, requested ones first, until nothing is missing."""
    choice = random.Random(7)
    source, destination = SourceMaps(COUNTS), DestinationMaps(COUNTS)
    for _ in range(15):
        page = source.next_page()
        assert page is not None
        destination.receive(page[0], page[1])
    source.mark_dirty("ram", 2, 3)
    for block, stale in source.start_postcopy().items():
        for first, count in ranges(stale):
            destination.discard(block, first, count)
    assert as_set(source.sent) == {("ram", 2), ("ram", 3), ("ram", 4)}
    destination.listen()
    while any(destination.missing_counts.values()):
        wanted = choice.choice(sorted(EVERY))
        if destination.fault(*wanted):
            source.request(*wanted)
            assert source.next_page() == (*wanted, True)
            assert destination.receive(*wanted)
        page = source.next_page()
        if page is not None:
            assert not destination.receive(page[0], page[1])
    assert source.dirty_count == 0
    assert source.next_page() is None


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (20, 1), (19, 2), (0, 0), (0, -1)])
def test_pages_outside_the_block_are_an_error(first: int, count: int) -> None:
    source, destination = SourceMaps(COUNTS), DestinationMaps(COUNTS)
    with pytest.raises(IndexError):
        source.mark_dirty("ram", first, count)
    with pytest.raises(IndexError):
        source.request("ram", first, count)
    with pytest.raises(IndexError):
        destination.discard("ram", first, count)
    if count == 1:
        with pytest.raises(IndexError):
            destination.receive("ram", first)
