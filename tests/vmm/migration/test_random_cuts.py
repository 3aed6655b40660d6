"""Connections that break at random bytes, until the guest is whole on one side: never on two.

One line reproduces a run: `PAGEFERRY_SEED=17 pytest tests/vmm/migration/test_random_cuts.py`.
"""

from __future__ import annotations

import os
import pathlib
import random

import pytest

from tests.support.moves import SOAK
from tests.support.real_machines import MIB, Side, Sides, until
from tests.support.relay import CutAt, Cutter, Relay, at_byte, passes
from tests.support.requires import requires
from vmm.migration.errors import MigrationRefused
from vmm.run_state import RunState

RUNS = 2000 if SOAK else 80
MOST_CUTS = 5
SEED = os.environ.get("PAGEFERRY_SEED")


class Journey:
    """One guest, its two machines, and a wire whose breaking points come from a seed."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.machines = Sides(folder)
        self.folder = folder
        self.connections = 0
        self.postcopy = self.random.random() < 0.7
        make = self.machines.postcopy_pair if self.postcopy else self.machines.pair
        self.source, self.destination = make(append="pages=192 beat=16", memory=4 * MIB)
        self.source.wait_heartbeat()
        if self.postcopy:
            slow = {"max-bandwidth": 1, "downtime-limit": 0}
            brake = self.random.choice((0, 20 * MIB))
            self.source.migrator.set_parameters({**slow, "max-postcopy-bandwidth": brake})

    def _cut(self, part: float, *limits: int) -> CutAt:
        if self.connections > MOST_CUTS or self.random.random() > part:
            return passes
        return at_byte(self.random.randrange(1, self.random.choice(limits)))

    def connect(self, target: str, *, resume: bool) -> str:
        """One connection, until the source has an opinion: which."""
        self.connections += 1
        cutters = Cutter(self._cut(0.7, 100, 3000, 900_000)), Cutter(self._cut(0.4, 60, 400))
        path = f"{self.folder}/r{self.connections}"
        relay = Relay(path, target.removeprefix("unix:"), *cutters)
        for cutter in cutters:
            cutter.relay = relay
        try:
            since = len(self.source.events)
            self.source.migrator.migrate(f"unix:{path}", resume=resume)
            if self.postcopy and not resume:
                self.source.migrator.start_postcopy()
            return self.source.wait("postcopy-paused", "failed", "completed", since=since)
        finally:
            relay.close()

    def go(self) -> None:
        """Until the guest is whole on one side."""
        target, resume = self.machines.uri, False
        while True:
            match self.connect(target, resume=resume):
                case "completed":
                    self.check_at(self.destination, self.source)
                    return
                case "failed":
                    until(lambda: self.destination.status in ("failed", "none"), "the destination's failure")
                    assert self.destination.machine.run_state is RunState.INMIGRATE
                    assert self.destination.serial.text == ""
                    self.check_at(self.source)
                    if self.connections > MOST_CUTS or self.random.random() < 0.5:
                        return
                    target, resume = self.machines.uri, False
                case _:
                    assert self.source.machine.run_state is RunState.FINISH_MIGRATE
                    target, resume = f"{self.machines.uri}-{self.connections}", True
                    until(lambda: self.recover(target), "migrate-recover")  # noqa: B023 - called at once

    def recover(self, target: str) -> bool:
        """The destination may not have noticed yet that it is paused."""
        try:
            self.destination.migrator.recover(target)
        except MigrationRefused:
            return False
        return True

    @staticmethod
    def check_at(here: Side, *before: Side) -> None:
        until(lambda: here.machine.run_state is RunState.RUNNING, "the guest's start")
        here.wait_heartbeat(2)
        assert here.verdict(*before).is_good, here.verdict(*before)


@pytest.mark.slow
def test_random_cuts(tmp_path: pathlib.Path) -> None:
    requires("uffd")
    seeds = [int(SEED)] if SEED else range(RUNS)
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        journey = Journey(folder, seed)
        try:
            journey.go()
        except BaseException as error:
            error.add_note(f"again: PAGEFERRY_SEED={seed} pytest tests/vmm/migration/test_random_cuts.py")
            raise
        finally:
            journey.machines.close()
