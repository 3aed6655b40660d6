"""The postcopy state: every (state, event) pair is a legal move or the documented error."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.migration import wire
from vmm.migration.errors import WrongPostcopyState
from vmm.migration.postcopy_state import MOVES, PostcopyStateMachine
from vmm.migration.postcopy_state import PostcopyEvent as E
from vmm.migration.postcopy_state import PostcopyState as S

WAY = {
    S.NONE: [],
    S.ADVISE: [E.ADVISE],
    S.DISCARD: [E.ADVISE, E.DISCARD],
    S.LISTENING: [E.ADVISE, E.LISTEN],
    S.RUNNING: [E.ADVISE, E.DISCARD, E.LISTEN, E.RUN],
    S.END: [E.ADVISE, E.LISTEN, E.RUN, E.END],
}
LEGAL = {
    (S.NONE, E.ADVISE): S.ADVISE,
    (S.ADVISE, E.DISCARD): S.DISCARD,
    (S.ADVISE, E.LISTEN): S.LISTENING,
    (S.ADVISE, E.END): S.END,
    (S.DISCARD, E.DISCARD): S.DISCARD,
    (S.DISCARD, E.LISTEN): S.LISTENING,
    (S.LISTENING, E.RUN): S.RUNNING,
    (S.LISTENING, E.RESUME): S.LISTENING,
    (S.LISTENING, E.RECV_BITMAP): S.LISTENING,
    (S.RUNNING, E.END): S.END,
    (S.RUNNING, E.RESUME): S.RUNNING,
    (S.RUNNING, E.RECV_BITMAP): S.RUNNING,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)))
def test_every_pair_is_a_move_or_an_error(state: S, event: E) -> None:
    machine = PostcopyStateMachine()
    for step in WAY[state]:
        machine.handle(step)
    assert machine.state is state
    if (state, event) in LEGAL:
        assert machine.handle(event) is LEGAL[state, event]
        assert machine.state is LEGAL[state, event]
    else:
        text = f"{event.value} in wrong postcopy state \\({state.value}\\)"
        with pytest.raises(WrongPostcopyState, match=text) as caught:
            machine.handle(event)
        assert (caught.value.command, caught.value.state) == (event.value, state.value)
        assert machine.state is state


def test_the_events_are_named_as_on_the_wire() -> None:
    assert {event.value for event in E} - {"END"} <= {command.name for command in wire.Command}
    assert set(MOVES) == set(S)


@given(st.lists(st.sampled_from(list(E)), max_size=12))
def test_states_are_reported_once_and_only_forwards(events: list[E]) -> None:
    reported: list[S] = []
    machine = PostcopyStateMachine(reported.append)
    order = list(S)
    for event in events:
        before = machine.state
        try:
            after = machine.handle(event)
        except WrongPostcopyState:
            after = before
        assert order.index(after) >= order.index(before)
    assert len(set(reported)) == len(reported)
    assert not reported or reported[-1] is machine.state
