"""One migration that is cut, judged by the promise: somebody runs the guest, or a way back works.

    source runs | destination runs | paused, and the way back is taken and works        never two, never none

After that the guest's whole life is audited, it is stopped, and every page that it does not write to is
compared with what it was before the migration.
"""

from __future__ import annotations

import enum
import functools
import pathlib
import subprocess

from tests.support.cuts import Cut, CuttingRelay
from tests.support.oracle import Collector, Runner, SingleRunner
from tests.support.real_machines import PAGE, Side, until
from tools import guest_builder

__all__ = ["APPEND", "MEMORY_BYTES", "SETTLED", "Flow", "Outcome", "Trial", "check_pages"]

MEMORY_BYTES = 96 * PAGE
FIRST, PAGES = 0x48, 12
"""Pages of the auditor's records."""
APPEND = f"start={FIRST * PAGE:#x} pages={PAGES} beat=4"

SETTLED = ("completed", "failed", "cancelled", "postcopy-paused")
SETTLE_S = 60.0

POSTCOPY_BANDWIDTH = 8 << 20
"""Slow enough for the guest to ask for pages, fast enough for a thousand trials."""


class Flow(enum.Enum):
    """What is cut."""

    PRECOPY = "precopy"
    POSTCOPY = "postcopy"
    """Begun before anything was sent: nearly all pages come after the switch."""
    LATE = "late"
    """Postcopy begun when everything was sent once: only what the guest has written since comes after it."""
    RECOVERY = "recovery"
    """As `POSTCOPY`; it is the second connection that is cut."""


class Outcome(enum.Enum):
    """What the cut led to, before any way back was taken."""

    SOURCE = "the source runs"
    DESTINATION = "the destination runs"
    PAUSED = "paused"


@functools.cache
def stack_page() -> int:
    """The one page that the guest writes to beside its records."""
    elf = guest_builder.build("auditor")
    symbols = subprocess.run(["nm", str(elf)], capture_output=True, text=True, check=True).stdout
    (top,) = (int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" stack_top"))
    return top // PAGE - 1


def check_pages(before: bytes, after: bytes) -> None:
    """Every page that the guest does not write to is what it was. Raises AssertionError."""
    may_differ = {*range(FIRST, FIRST + PAGES), stack_page()}
    for page in range(MEMORY_BYTES // PAGE):
        place = slice(page * PAGE, (page + 1) * PAGE)
        assert page in may_differ or before[place] == after[place], f"page {page:#x} differs"


class Trial:
    """Two machines and a relay; `run` once, then `close`, which fails if a thread does not end."""

    def __init__(self, folder: pathlib.Path, flow: Flow, *cuts: Cut) -> None:
        self._folder = folder
        self._flow = flow
        self._listening_at = f"{folder}/d"
        self._collector = Collector()
        self._source = self._make("source")
        self._destination = self._make("destination", incoming=True)
        self._oracle = SingleRunner(
            self._collector,
            [
                Runner("source", lambda: str(self._source.machine.run_state)),
                Runner("destination", lambda: str(self._destination.machine.run_state)),
            ],
        )
        self.ways_back = 0
        """How often the migration was resumed."""
        self.relay = CuttingRelay(f"{folder}/r", self._listening_at, cuts)

    def _make(self, name: str, *, incoming: bool = False) -> Side:
        side = Side("auditor", APPEND, memory=MEMORY_BYTES, incoming=incoming, paused=not incoming)
        side.machine.devices.serial.sink = self._collector.console(name)
        if self._flow is not Flow.PRECOPY:
            side.capability("postcopy-ram")
        return side

    def run(self) -> Outcome:
        """The migration, the cut, the judgement, the way back, the comparison. Raises AssertionError."""
        source, destination = self._source, self._destination
        destination.migrator.incoming(f"unix:{self._listening_at}")
        source.machine.cont()
        self._oracle.check_lives(1)
        before = source.machine.ram.blocks[0].read(0, MEMORY_BYTES)
        self._begin()
        outcome = self._settle()
        if outcome is Outcome.PAUSED:
            self._take_the_way_back()
        where = self._compare(before)
        assert (where == "source") == (source.status == "failed"), "the status says who has the guest"
        return outcome

    def _begin(self) -> None:
        source, flow = self._source, self._flow
        is_early = flow in (Flow.POSTCOPY, Flow.RECOVERY)
        # In postcopy nothing, or all once, is sent before the switch: no downtime is short enough to end it.
        source.migrator.set_parameters(
            {
                "max-bandwidth": 1 if is_early else 0,
                "downtime-limit": 2000 if flow is Flow.PRECOPY else 0,
                "max-postcopy-bandwidth": POSTCOPY_BANDWIDTH,
            }
        )
        if flow is not Flow.PRECOPY:
            self._switch_in_pass(1 if is_early else 2)
        source.migrator.migrate(f"unix:{self.relay.path}")

    def _switch_in_pass(self, wanted: int) -> None:
        """Asked for by mig/source itself: by any other thread it comes some records later each time."""
        migrator = self._source.migrator
        report = migrator._pass_done

        def pass_done(number: int) -> None:
            report(number)
            if number < wanted:  # the dirty log is armed: what the guest writes now remains for later
                self._oracle.check_lives(2)
            if number == wanted:
                migrator.start_postcopy()

        migrator._pass_done = pass_done  # type: ignore[method-assign]  # the only way into mig/source

    def describe(self) -> str:
        """What both sides say, for a failure."""
        sides = ((n, s) for n, s in (("source", self._source), ("destination", self._destination)))
        said = [
            f"{n}: {s.machine.run_state}, {s.status}, {s.error!r}, events {s.events[-6:]}" for n, s in sides
        ]
        passed = [(len(a), len(b)) for a, b in zip(self.relay.sent, self.relay.answered, strict=True)]
        return "\n".join([*said, f"passed: {passed}, cuts made: {[str(c) for c in self.relay.done]}"])

    # ---- after the cut

    def _settle(self) -> Outcome:
        """Until neither side will do anything more by itself; who runs the guest then."""
        until(lambda: self._source.status in SETTLED, "the source settles", SETTLE_S)
        heard = bool(self.relay.sent and len(self.relay.sent[0]) > 64)
        # A destination that has heard nothing, or not enough, may as well never notice.
        quiet = () if heard else ("setup", "none")
        until(lambda: self._destination_status in (*SETTLED, *quiet), "the destination settles", SETTLE_S)
        where = self._oracle.running()
        if where is None:
            return Outcome.PAUSED
        if self._source.status == "postcopy-paused":
            return Outcome.PAUSED  # the guest runs until it needs a page that nobody sends, or has them all
        return Outcome.SOURCE if where == "source" else Outcome.DESTINATION

    @property
    def _destination_status(self) -> str:
        return str(self._destination.migrator._incoming_status.status.value)

    def _take_the_way_back(self) -> None:
        """Recover, again and again if the relay cuts that, too, until the guest runs somewhere for good."""
        source, destination = self._source, self._destination
        for number in range(1, 5):
            assert source.status == "postcopy-paused", "there is no way back"
            self.ways_back += 1
            since = len(source.events)
            self.relay.target = f"{self._listening_at}{number}"
            destination.migrator.recover(f"unix:{self.relay.target}")
            source.migrator.migrate(f"unix:{self.relay.path}", resume=True)
            source.wait(*SETTLED, since=since)
            if source.status != "postcopy-paused":
                break
            until(lambda: self._destination_status in SETTLED, "the destination settles", SETTLE_S)
        assert source.status in ("completed", "failed"), "the way back does not work"
        if source.status == "completed":
            until(lambda: self._destination_status == "completed", "the destination has it all", SETTLE_S)

    def _compare(self, before: bytes) -> str:
        where = self._oracle.check_lives(2)
        side = self._source if where == "source" else self._destination
        until(lambda: not side.migrator.has_missing_pages, "every page is here")
        side.pause()
        self._oracle.check()
        after = side.machine.ram.blocks[0].read(0, MEMORY_BYTES)
        check_pages(before, after)
        return where

    def close(self) -> None:
        """End everything."""
        self.relay.close()
        for side in (self._destination, self._source):
            side.close()
