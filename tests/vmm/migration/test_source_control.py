"""What others want of a running migration, and what its end makes of it."""

from __future__ import annotations

import threading

import pytest

from vmm.migration.errors import Cancelled, MigrationRefused
from vmm.migration.source_control import SourceControl
from vmm.migration.status import MigrationStatus, Role, StatusMachine

DEADLINE_S = 60.0


def active(status: StatusMachine) -> SourceControl:
    status.move(MigrationStatus.SETUP)
    status.move(MigrationStatus.ACTIVE)
    return SourceControl(status)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_guest_stays_here(wanted: bool) -> None:
    control = active(StatusMachine(Role.SOURCE))
    if wanted:
        control.request_cancel()
    assert control.end_here() is wanted
    assert control.status.status is (MigrationStatus.CANCELLED if wanted else MigrationStatus.FAILED)
    control.request_cancel()  # nothing to do any more
    assert not control.status.is_in_progress


def test_a_cancel_in_the_middle_of_the_end() -> None:
    """Between mig/source's look at the status and its move to `failed`: it was `cancelling` for ever."""
    refused: list[BaseException] = []

    class Interrupted(StatusMachine):
        def move(self, status: MigrationStatus, *, only_from: MigrationStatus | None = None) -> bool:
            moved = super().move(status, only_from=only_from)
            if only_from is MigrationStatus.CANCELLING and not moved:
                cancel.start()
                cancel.join(0.05)  # it gets as far as it can
            return moved

    def request() -> None:
        try:
            control.request_cancel()
        except BaseException as error:
            refused.append(error)

    control = active(Interrupted(Role.SOURCE))
    cancel = threading.Thread(target=request)
    assert not control.end_here()
    cancel.join(DEADLINE_S)
    assert control.status.status is MigrationStatus.FAILED
    assert refused == []


def test_a_cancel_and_the_hand_over_exclude_each_other() -> None:
    control = active(StatusMachine(Role.SOURCE))
    control.request_cancel()
    with pytest.raises(Cancelled):
        control.hand_over()
    with pytest.raises(Cancelled):
        control.begin_postcopy()
    assert not control.handed_over
    control = active(StatusMachine(Role.SOURCE))
    control.hand_over()
    with pytest.raises(MigrationRefused, match="cannot cancel"):
        control.request_cancel()
