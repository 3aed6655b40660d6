"""SIGKILL, or SIGSTOP and SIGCONT, of either side at random times: nobody runs twice, nothing is lost.

    PAGEFERRY_KILLS=1000   so many instead of the gate's
    PAGEFERRY_SEED=7       others
    PAGEFERRY_KILL='1/17'  only this one (seed/number, as a failure prints it)

A killed process takes with it what only it held: then the survivor says what is so, and never runs a copy
that may be stale. After a stop both go on, or there is a way back, which is taken.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
import random
import signal
import tempfile
import time
from collections.abc import Iterator

import pytest

from tests.support.cut_trial import SETTLED, check_pages
from tests.support.machine_process import ConsoleFile, MachineProcess
from tests.support.oracle import Runner, SingleRunner
from tests.support.real_machines import until
from tests.support.requires import requires

KILLS = int(os.environ.get("PAGEFERRY_KILLS", "200"))
SEED = int(os.environ.get("PAGEFERRY_SEED", "1"))
SETTLE_S = 60.0
UNHEARD_S = 0.1
"""What a dead process has sent is read within this time, or there was nothing."""
SLOW = 256 << 10
"""Bytes a second: a phase lasts longer than it takes until it is struck."""

PHASES = ("precopy", "switchover", "postcopy", "recovery")
LONGEST_MS = {"precopy": 25, "switchover": 12, "postcopy": 40, "recovery": 10}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to whom, and when."""

    name: str
    phase: str
    victim: str
    deadly: bool
    after_s: float
    stopped_s: float

    @classmethod
    def chosen(cls, seed: int, number: int) -> Plan:
        """The same for the same seed and number."""
        chooser = random.Random(f"{seed}/{number}")
        phase = PHASES[number % len(PHASES)]
        return cls(
            f"{seed}/{number}",
            phase,
            chooser.choice(("source", "destination")),
            chooser.random() < 0.6,
            chooser.uniform(0, LONGEST_MS[phase]) / 1000,
            chooser.uniform(0.001, 0.05),
        )


class Run:
    """One pair of processes, and what happens to it."""

    def __init__(self, folder: pathlib.Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._console = ConsoleFile(folder / "console")
        self._sides = {
            "source": MachineProcess("source", self._console),
            "destination": MachineProcess("destination", self._console, incoming=True),
        }
        self._alive = dict(self._sides)
        self._door = 0

    # ---- steps

    def go(self) -> str:
        """All of it; how it came out."""
        source, destination = self._sides["source"], self._sides["destination"]
        destination.call("migrator", "incoming", self._uri)
        source.call("cont")
        self._oracle().check_lives(1)
        before = source.call("memory")
        self._lead_to_phase()
        time.sleep(self._plan.after_s)  # the random time, not a condition
        self._strike()
        self._settle()
        outcome = self._judge_survivor() if self._plan.deadly else self._judge_both(before)
        self._oracle().check()
        return f"{self._plan.phase}: {outcome}"

    @property
    def _uri(self) -> str:
        return f"unix:{self._folder}/m{self._door or ''}"

    def _oracle(self) -> SingleRunner:
        states = {name: functools.partial(self._run_state, name) for name in self._alive}
        return SingleRunner(self._console, [Runner(name, state) for name, state in states.items()])

    def _run_state(self, name: str) -> str:
        return str(self._sides[name].call("state")[0])

    def _lead_to_phase(self) -> None:
        source = self._sides["source"]
        is_postcopy = self._plan.phase in ("postcopy", "recovery")
        bandwidth = {"switchover": 0, "precopy": SLOW}.get(self._plan.phase, 1)
        parameters = {
            "max-bandwidth": bandwidth,
            "max-postcopy-bandwidth": 1 if self._plan.phase == "recovery" else SLOW,
            "downtime-limit": 2000 if self._plan.phase == "switchover" else 0,
        }
        source.call("migrator", "set_parameters", parameters)
        source.call("migrator", "migrate", self._uri)
        if is_postcopy:
            source.call("migrator", "start_postcopy")
        if self._plan.phase == "recovery":
            until(lambda: self._run_state("destination") == "running", "the guest moves", SETTLE_S)
            source.call("migrator", "pause")
            self._settle()
            source.call("migrator", "set_parameters", {"max-postcopy-bandwidth": SLOW})
            self._come_back()

    def _come_back(self) -> None:
        """The two steps of recovery, if it is still needed."""
        if self._status("source") != "postcopy-paused":
            return
        self._door += 1
        self._sides["destination"].call("migrator", "recover", self._uri)
        self._sides["source"].call("resume", self._uri)

    def _strike(self) -> None:
        victim = self._sides[self._plan.victim]
        if self._plan.deadly:
            victim.signal(signal.SIGKILL)
            del self._alive[self._plan.victim]
            return
        victim.signal(signal.SIGSTOP)
        time.sleep(self._plan.stopped_s)
        victim.signal(signal.SIGCONT)
        no_limits = {"max-bandwidth": 0, "max-postcopy-bandwidth": 0, "downtime-limit": 2000}
        self._sides["source"].call("migrator", "set_parameters", no_limits)

    def _status(self, name: str) -> str:
        state = self._sides[name].call("state")
        return str(state[1] if name == "source" else state[2])

    def _settle(self) -> None:
        """Until nobody who lives will do anything more by itself."""
        for name in self._alive:
            until(functools.partial(self._is_settled, name), f"the {name} settles", SETTLE_S)

    def _is_settled(self, name: str) -> bool:
        status = self._status(name)
        may_be_next = self._plan.deadly and status in ("setup", "postcopy-paused")
        if may_be_next and (name == "destination" or status != "setup"):
            time.sleep(UNHEARD_S)  # what the dead one has said may be on its way
            return self._status(name) == status
        return status in SETTLED

    # ---- judgement

    def _judge_survivor(self) -> str:
        ((name, survivor),) = self._alive.items()
        oracle = self._oracle()
        state, _, _, error = survivor.call("state")
        status = self._status(name)
        if oracle.running() is None:
            said = self._console.text
            assert state != "running"
            assert status in ("postcopy-paused", "failed", "setup", "completed"), status
            assert error or status in ("setup", "completed"), "the survivor does not say why"
            assert self._console.text == said, "somebody runs it after all"
            return f"the {name} keeps still ({status})"
        if name == "destination" and status == "postcopy-paused":
            return "the destination has what it has"  # it runs until it needs a page that is gone
        assert oracle.check_lives(2) == name
        assert status == ("failed" if name == "source" else "completed"), status
        return f"the {name} runs"

    def _judge_both(self, before: bytes) -> str:
        came_back = 0
        while self._status("source") == "postcopy-paused":
            came_back += 1
            assert came_back < 5, "the way back does not work"
            self._come_back()
            time.sleep(0.001)
            self._settle()
        where = self._oracle().check_lives(2)
        assert self._status("source") == ("failed" if where == "source" else "completed")
        runner = self._sides[where]
        until(lambda: runner.call("is_whole"), "every page is here", SETTLE_S)
        runner.call("pause")
        check_pages(before, runner.call("memory"))
        return f"the {where} runs{' after recovery' if came_back else ''}"

    def describe(self) -> str:
        """For a failure."""
        states = {name: side.call("state") for name, side in self._alive.items()}
        return f"{self._plan}\n{states}\n{self._console.text[-300:]}"

    def close(self) -> None:
        """End both. Raises AssertionError for a traceback in what they wrote."""
        for side in self._sides.values():
            said = side.kill()
            assert "Traceback" not in said, f"{side.name} of {self._plan}:\n{said}"


def one(plan: Plan) -> str:
    """One run, with a failure that says how to see it again."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(pathlib.Path(folder), plan)
        try:
            return run.go()
        except AssertionError as error:
            again = f"PAGEFERRY_KILL={plan.name} python -m pytest {__file__} -k one_kill"
            raise AssertionError(f"{again}\n{error}\n{run.describe()}") from error
        finally:
            run.close()


@pytest.fixture(scope="module", autouse=True)
def no_server_is_left() -> Iterator[None]:
    """The process that the machines are forked from ends, too."""
    yield
    MachineProcess.stop_server()


@pytest.mark.slow
@pytest.mark.timeout(300 + KILLS)
def test_kills_at_random_times() -> None:
    requires("uffd")
    print(f"seed {SEED}")
    outcomes = collections.Counter(one(Plan.chosen(SEED, number)) for number in range(KILLS))
    print(*(f"{count:>5}  {outcome}" for outcome, count in sorted(outcomes.items())), sep="\n")
    assert len(outcomes) >= 8, "not every phase was met"


@pytest.mark.skipif("PAGEFERRY_KILL" not in os.environ, reason="PAGEFERRY_KILL names one")
def test_one_kill() -> None:
    seed, _, number = os.environ["PAGEFERRY_KILL"].partition("/")
    for _ in range(20):
        print(one(Plan.chosen(int(seed), int(number))))
