"""run_state: every pair of states is a move of the table or the documented error."""

from __future__ import annotations

import itertools

import pytest

from vmm.errors import IllegalRunState
from vmm.run_state import LEGAL_MOVES, NEEDS_RESET, RunState, check_move


def test_every_state_is_listed() -> None:
    assert set(LEGAL_MOVES) == set(RunState)


@pytest.mark.parametrize(("current", "wanted"), list(itertools.product(RunState, RunState)))
def test_every_pair(current: RunState, wanted: RunState) -> None:
    if wanted is current or wanted in LEGAL_MOVES[current]:
        check_move(current, wanted)
    else:
        with pytest.raises(IllegalRunState) as caught:
            check_move(current, wanted)
        assert (caught.value.current, caught.value.wanted) == (str(current), str(wanted))


@pytest.mark.parametrize("state", [s for s in RunState if s not in (RunState.SAVE_VM, RunState.PRELAUNCH)])
def test_a_reset_is_always_possible(state: RunState) -> None:
    if state not in (RunState.INMIGRATE, RunState.RUNNING):
        check_move(state, RunState.PRELAUNCH)


def test_what_needs_a_reset_cannot_go_on() -> None:
    for state in NEEDS_RESET:
        assert RunState.RUNNING not in LEGAL_MOVES[state]
