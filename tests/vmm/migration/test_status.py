"""MigrationStatus: every pair of states is a legal move or the documented error."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest

from vmm.migration.errors import IllegalStatusMove
from vmm.migration.status import IN_PROGRESS, MOVES, Role, StatusMachine
from vmm.migration.status import MigrationStatus as S


def path_to(role: Role, goal: S) -> list[S] | None:
    """A shortest way from none to `goal`, by the table."""
    paths = [[S.NONE]]
    seen = {S.NONE}
    for path in paths:
        if path[-1] is goal:
            return path[1:]
        for status in sorted(MOVES[role][path[-1]] - seen, key=lambda status: status.value):
            seen.add(status)
            paths.append([*path, status])
    return None


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("current", "wanted"), list(itertools.product(S, S)))
def test_every_pair_is_a_move_or_an_error(role: Role, current: S, wanted: S) -> None:
    path = path_to(role, current)
    if path is None:
        assert not MOVES[role][current], "a status that cannot be reached has moves"
        return
    changes: list[S] = []
    machine = StatusMachine(role, changes.append)
    for status in path:
        assert machine.move(status)
    if wanted in MOVES[role][current]:
        assert machine.move(wanted)
        assert machine.status is wanted
        assert changes == [*path, wanted]
    else:
        with pytest.raises(IllegalStatusMove) as caught:
            machine.move(wanted)
        assert (caught.value.role, caught.value.current, caught.value.wanted) == (
            role.value,
            current.value,
            wanted.value,
        )
        assert machine.status is current
        assert changes == path


FLOWS = [
    (Role.SOURCE, "setup active completed setup"),
    (Role.SOURCE, "setup active pre-switchover device completed"),
    (Role.SOURCE, "setup active postcopy-active completed"),
    (Role.SOURCE, "setup active pre-switchover postcopy-active completed"),
    (Role.SOURCE, "setup active postcopy-active postcopy-paused postcopy-recover postcopy-active completed"),
    (Role.SOURCE, "setup active postcopy-active postcopy-paused postcopy-recover postcopy-paused"),
    (Role.SOURCE, "setup active cancelling cancelled setup"),
    (Role.SOURCE, "setup active pre-switchover cancelling cancelled"),
    (Role.SOURCE, "setup failed setup"),
    (Role.DESTINATION, "setup active completed"),
    (Role.DESTINATION, "setup active postcopy-active completed"),
    (Role.DESTINATION, "setup active setup active failed setup"),
    (Role.DESTINATION, "setup active postcopy-active postcopy-paused postcopy-recover postcopy-active"),
]


@pytest.mark.parametrize(("role", "flow"), FLOWS)
def test_the_flows_of_qemu(role: Role, flow: str) -> None:
    machine = StatusMachine(role)
    assert machine.role is role
    for name in flow.split():
        machine.move(S(name))
    assert machine.is_in_progress == (machine.status in IN_PROGRESS)


def test_every_status_is_listed_for_both_roles_in_qemus_order() -> None:
    names = (
        "none setup cancelling cancelled active postcopy-active postcopy-paused postcopy-recover "
        "completed failed colo pre-switchover device wait-unplug"
    )
    assert [status.value for status in S] == names.split()
    for role in Role:
        assert set(MOVES[role]) == set(S)


def test_of_two_threads_that_end_a_migration_one_wins() -> None:
    machine = StatusMachine(Role.SOURCE)
    machine.move(S.SETUP)
    machine.move(S.ACTIVE)
    barrier = threading.Barrier(2)
    won: list[S] = []

    def end(status: S) -> None:
        barrier.wait(10)
        if machine.move(status, only_from=S.ACTIVE):
            won.append(status)

    threads = [threading.Thread(target=end, args=(status,)) for status in (S.COMPLETED, S.CANCELLING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert won == [machine.status]


def test_a_move_is_logged_and_on_change_may_ask(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[S] = []
    machine = StatusMachine(Role.SOURCE, lambda _: seen.append(machine.status))
    with caplog.at_level(logging.INFO):
        machine.move(S.SETUP)
    assert seen == [S.SETUP]
    assert "none -> setup" in caplog.text
