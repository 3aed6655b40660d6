"""The order to start a guest: given or withdrawn once, told truly; both ends of it, on a wire that breaks."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmm.migration.errors import MigrationError
from vmm.migration.hand_over import MOVES, Orders, StartOrder, StartState
from vmm.migration.peer import Fate

WHY = MigrationError("the reason")


def in_state(state: StartState) -> StartOrder:
    order = StartOrder()
    if state is StartState.WITHDRAWN:
        order.withdraw(WHY)
    if state in (StartState.STARTED, StartState.COMPLETE):
        order.give()
    if state is StartState.COMPLETE:
        order.complete()
    assert order.state is state
    return order


EVENTS = {
    "give": lambda order: order.give(),
    "withdraw": lambda order: order.withdraw(WHY),
    "could_not_start": lambda order: order.could_not_start(),
    "complete": lambda order: order.complete(),
    "fate": lambda order: order.fate(),
}
_S = StartState
AFTER = {
    (_S.WAITING, "give"): _S.STARTED,
    (_S.WAITING, "withdraw"): _S.WITHDRAWN,
    (_S.WAITING, "fate"): _S.WITHDRAWN,
    (_S.STARTED, "could_not_start"): _S.WITHDRAWN,
    (_S.STARTED, "complete"): _S.COMPLETE,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(StartState, EVENTS)))
def test_every_event_in_every_state(state: StartState, event: str) -> None:
    order = in_state(state)
    EVENTS[event](order)
    assert order.state is AFTER.get((state, event), state)
    assert order.state is state or order.state in MOVES[state]


def test_who_comes_first_wins() -> None:
    order = StartOrder()
    assert order.give()
    assert not order.withdraw(WHY)
    order.wait()
    order = StartOrder()
    assert order.withdraw(WHY)
    assert not order.give()
    with pytest.raises(MigrationError, match="the reason"):
        order.wait()


def test_who_waits_is_told() -> None:
    order, told = StartOrder(), threading.Event()

    def wait() -> None:
        order.wait()
        told.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    order.give()
    assert told.wait(10)
    waiter.join()


@pytest.mark.parametrize(
    ("state", "fate"),
    [
        (_S.WAITING, Fate.NOT_STARTED),
        (_S.WITHDRAWN, Fate.NOT_STARTED),
        (_S.STARTED, Fate.STARTED),
        (_S.COMPLETE, Fate.COMPLETE),
    ],
)
def test_what_the_source_is_told(state: StartState, fate: Fate) -> None:
    order = in_state(state)
    assert order.fate() is fate
    assert not order.give() or fate is not Fate.NOT_STARTED


def test_names() -> None:
    """A name that was told of, or whose guest ran, is not taken again; one that came to nothing is."""
    orders = Orders()
    assert not orders
    assert orders.fate(b"a") is Fate.UNKNOWN
    orders.new(b"a").withdraw(WHY)
    second = orders.new(b"a")
    assert orders
    assert second.give()
    with pytest.raises(MigrationError, match="61 has been here before"):
        orders.new(b"a")
    orders.new(b"b")
    assert orders.fate(b"b") is Fate.NOT_STARTED
    with pytest.raises(MigrationError, match="has been here before"):
        orders.new(b"b")


@given(st.lists(st.binary(min_size=1, max_size=2), max_size=60))
def test_what_is_remembered_is_bounded(names: list[bytes]) -> None:
    orders = Orders()
    for name in names:
        if orders.fate(name) is Fate.UNKNOWN:
            orders.new(name)
    assert len(orders._orders) <= 16


class TwoEnds(RuleBasedStateMachine):
    """The hand-over as both ends play it, with the real order at the destination, and a wire that may break.

    The source's side is written down once more, in its plainest form.
    """

    def __init__(self) -> None:
        super().__init__()
        self.orders = Orders()
        self.order = self.orders.new(b"name")
        self.wire: list[str] = []  # to the destination
        self.back: list[str] = []
        self.up = True
        self.source = "stopped"  # stopped -> runs | handed over -> knows it is gone
        self.loaded = False
        self.guest_at_destination = False

    @precondition(lambda self: self.up and not self.loaded)
    @rule()
    def load(self) -> None:
        self.loaded = True
        self.back.append("LOADED")

    @precondition(lambda self: self.up and "LOADED" in self.back and self.source == "stopped")
    @rule()
    def hand_over(self) -> None:
        self.back.remove("LOADED")
        self.source = "handed over"
        self.wire.append("START")

    @precondition(lambda self: self.source == "stopped")
    @rule()
    def cancel(self) -> None:
        self.source = "runs"
        if self.up:
            self.wire.append("KEEP")

    @precondition(lambda self: self.wire and self.loaded)
    @rule()
    def arrive(self) -> None:
        if self.wire.pop(0) == "START":
            if self.order.give():
                self.guest_at_destination = True
                self.back.append("STARTED")
        else:
            self.order.withdraw(WHY)

    @precondition(lambda self: self.back and self.back[0] == "STARTED")
    @rule()
    def hear(self) -> None:
        self.back.pop(0)
        self.source = "gone"

    @precondition(lambda self: self.up)
    @rule(lost=st.booleans())
    def cut(self, lost: bool) -> None:
        """What is on the wire may still arrive, for a while."""
        self.up = False
        if lost:
            self.wire.clear()
            self.back.clear()
        if self.source == "stopped":
            self.source = "runs"

    @precondition(lambda self: not self.up and not self.wire)
    @rule()
    def notice(self) -> None:
        self.order.withdraw(WHY)

    @precondition(lambda self: not self.up and self.source == "handed over")
    @rule()
    def ask(self) -> None:
        fate = self.orders.fate(b"name")
        self.source = {Fate.NOT_STARTED: "runs"}.get(fate, "gone")

    @rule()
    def wait(self) -> None:
        """Time passes: nothing changes by itself."""

    @invariant()
    def never_two(self) -> None:
        assert not (self.source == "runs" and self.guest_at_destination)

    @invariant()
    def there_is_a_way(self) -> None:
        """Somebody runs it, or the source still has it and can ask or be told."""
        if self.source == "gone":
            assert self.guest_at_destination


TestTwoEnds = TwoEnds.TestCase
