"""Every migration is cut at every record and at random bytes, both ways, and keeps its promise.

PAGEFERRY_CUTS=20000   so many random bytes instead of the gate's
PAGEFERRY_SEED=7       others
PAGEFERRY_CUT='postcopy 1/forward/record 17'   only this one (what a failure prints)
"""

from __future__ import annotations

import collections
import functools
import os
import pathlib
import random
import tempfile
from collections.abc import Iterable, Iterator

import pytest

from tests.support.cut_trial import Flow, Outcome, Trial
from tests.support.cuts import Cut, MessageSplitter, Splitter
from tests.support.oracle import Collector, DoubleRun, NoRunner, Runner, SingleRunner, check_one_life
from tests.support.real_machines import Side, Sides, until
from tests.support.recordings import NAMES, recording
from tests.support.requires import requires
from tools.stream_walk import walk
from vmm.errors import MachineError

RANDOM_CUTS = int(os.environ.get("PAGEFERRY_CUTS", "500"))
SEED = int(os.environ.get("PAGEFERRY_SEED", "1"))
TOLD = 3
"""So many failures are told in full."""

WAYS = [(flow, forward) for flow in Flow for forward in (True, False)]
IDS = [f"{flow.value}-{'forward' if forward else 'back'}" for flow, forward in WAYS]


@pytest.mark.parametrize("name", NAMES)
def test_the_relay_and_the_dumper_agree_where_records_end(name: str) -> None:
    raw = recording(name)
    splitter = Splitter()
    for at in range(0, len(raw), 1000):
        splitter.feed(raw[at : at + 1000])
    ends = {0, *splitter.ends}
    assert {item.offset for item in walk(raw, each_page=True)} <= ends
    assert splitter.ends[-1] == len(raw)


# ---- the oracle


def state_of(side: Side) -> str:
    return str(side.machine.run_state)


def test_the_oracle_sees_two_runners(machines: Sides) -> None:
    """A source that is made to run its copy, after the guest has moved."""
    collector = Collector()
    source = machines.make(append="pages=64 beat=4", paused=True)
    destination = machines.make(append="pages=64 beat=4", paused=True, incoming=True)
    sides = {"source": source, "destination": destination}
    for name, side in sides.items():
        side.machine.devices.serial.sink = collector.console(name)
    runners = [Runner(name, functools.partial(state_of, side)) for name, side in sides.items()]
    oracle = SingleRunner(collector, runners)
    destination.migrator.incoming(machines.uri)
    source.machine.cont()
    assert oracle.check_lives() == "source"
    source.migrator.migrate(machines.uri)
    source.wait("completed")
    destination.wait("completed")
    assert oracle.running() is None
    with pytest.raises(NoRunner):
        oracle.check_lives(deadline_s=0.05)
    destination.machine.cont()
    assert oracle.check_lives() == "destination"
    with pytest.raises(MachineError, match="may run there"):
        source.machine.cont()
    source.migrator.take_back()
    source.machine.cont()
    with pytest.raises(DoubleRun, match="destination and source both run"):
        oracle.running()
    with pytest.raises(DoubleRun, match="lived twice"):
        until(lambda: check_one_life(collector.text) is None, "the source says an old round")
    assert collector.speakers.count("source") >= 2


# ---- the cuts


def uncut(flow: Flow, connection: int) -> tuple[list[int], list[int]]:
    """Where the records of a connection end when it is not cut, each way."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(pathlib.Path(folder), flow, *first_cut(flow))
        try:
            trial.run()
            sent, answered = trial.relay.sent[connection - 1], trial.relay.answered[connection - 1]
        finally:
            trial.close()
    forward, back = Splitter(resumed=connection > 1), MessageSplitter()
    forward.feed(bytes(sent))
    back.feed(bytes(answered))
    return forward.ends, back.ends


def first_cut(flow: Flow) -> tuple[Cut, ...]:
    """What leads to the connection that is cut: recovery is the second one."""
    return (Cut(1, True, records=RECOVERY_AFTER),) if flow is Flow.RECOVERY else ()


RECOVERY_AFTER = 50
"""Records: the package is loaded, the guest runs at the destination, most pages are not there."""


def check(flow: Flow, cuts: Iterable[Cut]) -> collections.Counter[str]:
    """Run them all. Fails with a line for each cut that broke the promise, and how to see it again."""
    found: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    made = tried = 0
    for cut in cuts:
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(pathlib.Path(folder), flow, *first_cut(flow), cut)
            try:
                outcome = trial.run()
                found[outcome.name] += 1
            except AssertionError as error:
                again = f"PAGEFERRY_CUT='{flow.value} {cut}' python -m pytest {__file__} -k one_cut"
                broken.append(f"{again}\n{error!r}\n{trial.describe()}")
            finally:
                trial.close()
        tried += 1
        made += cut in trial.relay.done
        if len(broken) == TOLD:
            break
    assert not broken, f"{len(broken)} of {tried} (so far: {dict(found)})\n" + "\n\n".join(broken)
    # A guest that is scheduled otherwise dirties fewer pages, and asks for fewer: some streams are shorter.
    assert made >= min(0.5 * tried, tried - 3), f"only {made} of {tried} were cut: {dict(found)}"
    print(f"{flow.value}: {tried} cuts, {dict(found)}")
    return found


def connection_of(flow: Flow) -> int:
    return 2 if flow is Flow.RECOVERY else 1


@pytest.mark.slow
@pytest.mark.parametrize(("flow", "forward"), WAYS, ids=IDS)
def test_a_cut_at_every_record(flow: Flow, forward: bool) -> None:
    requires("uffd")
    number = connection_of(flow)
    count = len(uncut(flow, number)[0 if forward else 1])
    found = check(flow, (Cut(number, forward, records=at) for at in range(count + 1)))
    if forward and flow in (Flow.PRECOPY, Flow.LATE):
        assert found[Outcome.SOURCE.name] > 50, "before the hand-over the source goes on"
    if forward and flow is not Flow.PRECOPY:
        assert found[Outcome.PAUSED.name] > 10, "in postcopy there is a way back"


@pytest.mark.slow
@pytest.mark.parametrize(("flow", "forward"), WAYS, ids=IDS)
def test_a_cut_at_random_bytes(flow: Flow, forward: bool) -> None:
    requires("uffd")
    number = connection_of(flow)
    ends = uncut(flow, number)[0 if forward else 1]
    check(flow, random_cuts(flow, number, forward, ends))


def random_cuts(flow: Flow, number: int, forward: bool, ends: list[int]) -> Iterator[Cut]:
    """Half of them anywhere, half inside records, which are of very different lengths."""
    chooser = random.Random(f"{SEED}/{flow.value}/{forward}")
    share = RANDOM_CUTS // len(WAYS) * (3 if forward else 1) // 2
    starts = [0, *ends[:-1]]
    for at in range(share):
        record = chooser.randrange(len(ends))
        inside = chooser.randrange(starts[record], ends[record])
        yield Cut(number, forward, bytes=inside if at % 2 else chooser.randrange(ends[-1]))


@pytest.mark.skipif("PAGEFERRY_CUT" not in os.environ, reason="PAGEFERRY_CUT names one cut")
def test_one_cut() -> None:
    flow, _, text = os.environ["PAGEFERRY_CUT"].partition(" ")
    check(Flow(flow), [Cut.parse(text)])
