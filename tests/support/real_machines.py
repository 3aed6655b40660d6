"""Real machines in this process, with their migrators: guests run, sockets are real, only QMP is missing."""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

from tools import guest_builder
from tools.guest_checks import Verdict, audit
from vmm.config import BackendConfig, MachineConfig
from vmm.machine import Machine
from vmm.migration.migrator import Migrator
from vmm.ram import RamKind

__all__ = ["DEADLINE_S", "MIB", "PAGE", "Side", "Sides", "until"]

DEADLINE_S = 60.0
MIB = 1 << 20
PAGE = 4096
LAST = ("completed", "failed", "cancelled", "postcopy-paused")


def until(holds: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Wait for a condition that nothing reports; what made it true. Raises AssertionError."""
    end_s = time.monotonic() + deadline_s
    while not (result := holds()):
        assert time.monotonic() < end_s, f"not within {deadline_s} s: {what}"
        time.sleep(0.001)
    return result


class Output:
    """The outside of a serial port: keeps every byte. Fits `CharSink`."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write_nowait(self, data: bytes) -> int:
        self._bytes += data
        return len(data)

    def accept_input(self) -> None:
        """There is no input."""

    def wait_flushed(self, timeout_s: float, /) -> bool:
        del timeout_s
        return True

    @property
    def text(self) -> str:
        return self._bytes.decode("latin-1")


class Side:
    """A machine, its migrator, and what both have reported."""

    def __init__(
        self,
        guest: str | None = "auditor",
        append: str = "",
        *,
        memory: int = 16 * MIB,
        kind: RamKind = RamKind.ANONYMOUS,
        incoming: bool = False,
        paused: bool = False,
        fault: str | None = None,
        checksums: bool = True,
        **config: Any,
    ) -> None:
        name = {"microvm": "microvm.ram", "none": "ram"}[config.get("machine_type", "microvm")]
        backend = BackendConfig(
            name, memory, memfd=kind is not RamKind.ANONYMOUS, share=kind is RamKind.MEMFD_SHARED
        )
        image = None if guest is None else str(guest_builder.build(guest))
        boot = {"boot_drive" if image and image.endswith(".img") else "kernel": image}
        self.machine = Machine(
            MachineConfig(
                ram=(backend,),
                append=append,
                start_paused=paused,
                incoming="defer" if incoming else None,
                **{**boot, **config},
            )
        )
        self.serial = Output()
        self.machine.devices.serial.sink = self.serial
        self.events: list[tuple[str, Any]] = []
        self.changed = threading.Condition()
        self.machine.add_listener(self._notify)
        self.migrator = Migrator(self.machine, self._notify)
        if fault is not None:
            self.migrator.set_global("x-fault", fault)
        self.capability("events")
        self.capability("x-page-checksums", checksums)
        self.machine.start()

    def _notify(self, name: str, data: dict[str, Any]) -> None:
        with self.changed:
            self.events.append((name, next(iter(data.values()), None)))
            self.changed.notify_all()

    # ---- migration ----

    def capability(self, name: str, state: bool = True) -> None:
        self.migrator.set_capabilities([{"capability": name, "state": state}])

    @property
    def status(self) -> str:
        """query-migrate's."""
        return str(self.migrator.query().get("status", "none"))

    @property
    def error(self) -> str:
        """query-migrate's error-desc."""
        return str(self.migrator.query().get("error-desc", ""))

    def values(self, name: str) -> list[Any]:
        """What the events of this name have said."""
        return [value for event, value in self.events if event == name]

    def wait(self, *statuses: str, since: int = 0) -> str:
        """Until a migration status among these was reported after event number `since`; which.

        Fails at once when another status came that nothing follows.
        """

        def found() -> list[Any]:
            reported = [value for event, value in self.events[since:] if event == "MIGRATION"]
            return [value for value in reported if value in (*statuses, *LAST)]

        with self.changed:
            assert self.changed.wait_for(found, DEADLINE_S), (statuses, self.events, self.migrator.query())
            status = next((s for s in found() if s in statuses), found()[0])
        assert status in statuses, (status, self.error, self.events)
        return str(status)

    def wait_event(self, name: str, value: Any = None) -> None:
        """Until an event came, with `value` if one is given."""

        def found() -> bool:
            return any(n == name and value in (None, v) for n, v in self.events)

        with self.changed:
            assert self.changed.wait_for(found, DEADLINE_S), (name, value, self.events)

    # ---- the guest ----

    def wait_output(self, holds: Callable[[str], Any]) -> str:
        """Until the serial output is as `holds` wants it; all of it."""
        until(lambda: holds(self.serial.text), f"serial output; it is {self.serial.text[-200:]!r}")
        return self.serial.text

    def wait_heartbeat(self, more: int = 1) -> None:
        """Until an auditor or long mode guest has told `more` further rounds."""
        before = self.verdict().heartbeats
        self.wait_output(lambda _text: self.verdict().heartbeats >= before + more)

    def verdict(self, *before: Side) -> Verdict:
        """What the guest said, on the machines `before` and here."""
        return audit(*(side.serial.text for side in before), self.serial.text)

    def pause(self) -> None:
        """Stop the guest; it has stopped when this returns."""
        assert self.machine.stop(wait_s=DEADLINE_S), "the vCPU did not acknowledge"

    @property
    def received(self) -> Any:
        """The received map of the first RAMBlock of the attempt under way."""
        attempt = self.destination.attempt
        assert attempt is not None
        return attempt.loader.receiver.received[self.machine.ram.blocks[0].name]

    @property
    def destination(self) -> Any:
        """The migrator's own destination, for what no command shows."""
        return self.migrator._destination

    # ---- the end ----

    def heal(self) -> None:
        """Put zeroes where pages are missing that nobody will send, so that whoever waits for one can end."""
        attempt = self.destination.attempt if self.destination else None
        if attempt is None or attempt.listener is None or attempt.listener.ended:
            return
        for block in self.machine.ram.blocks:
            for page in range(block.page_count):
                if not attempt.loader.receiver.received[block.name].test(page):
                    attempt.listener._uffd.zeropage(block.host_address + page * PAGE, PAGE)

    def close(self) -> None:
        """End everything; fails if a thread does not end."""
        for name in ("max-bandwidth", "max-postcopy-bandwidth"):
            self.migrator.set_parameters({name: 0})
        ended = self.migrator.shutdown(DEADLINE_S)
        self.heal()
        assert self.machine.close(DEADLINE_S), "the vCPU's thread did not end"
        assert ended, "a migration thread did not end"


class Sides:
    """Makes machines and closes them all, whatever happens."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._made: list[Side] = []

    def make(self, *arguments: Any, **options: Any) -> Side:
        """One machine, started."""
        side = Side(*arguments, **options)
        self._made.append(side)
        return side

    @property
    def uri(self) -> str:
        """Where the destinations of this test listen."""
        return f"unix:{self.folder}/m"

    def pair(
        self, *arguments: Any, paused: bool = False, fault_at_destination: str | None = None, **options: Any
    ) -> tuple[Side, Side]:
        """A source that runs and a destination that listens; `paused`: it does not start the guest."""
        source = self.make(*arguments, **options)
        options = {**options, "fault": fault_at_destination, "incoming": True, "paused": paused}
        destination = self.make(*arguments, **options)
        destination.migrator.incoming(self.uri)
        return source, destination

    def postcopy_pair(self, *arguments: Any, **options: Any) -> tuple[Side, Side]:
        """As `pair`, with the capability on both sides."""
        source, destination = self.pair(*arguments, **options)
        for side in (source, destination):
            side.capability("postcopy-ram")
        return source, destination

    def to_postcopy(self, source: Side, destination: Side, **parameters: int) -> None:
        """Migrate, slowly, and switch to postcopy as soon as that is possible; wait until RUN was obeyed."""
        # No downtime is short enough for precopy to end, however little there is to send.
        settings = {"max-bandwidth": 1, "max-postcopy-bandwidth": 2 * MIB, "downtime-limit": 0}
        source.migrator.set_parameters(
            {**settings, **{k.replace("_", "-"): v for k, v in parameters.items()}}
        )
        source.migrator.migrate(self.uri)
        source.wait("active")
        source.migrator.start_postcopy()
        destination.wait_event("POSTCOPY_STATE", "running")

    def finish(self, source: Side, destination: Side) -> None:
        """Take the brakes off and wait until both sides have completed."""
        source.migrator.set_parameters({"max-bandwidth": 0, "max-postcopy-bandwidth": 0})
        source.wait("completed")
        destination.wait("completed")

    def close(self) -> None:
        """Close the last first; all of them, then fail if one did not end."""
        problems = []
        for side in reversed(self._made):
            try:
                side.close()
            except Exception as error:  # each must get its chance to end
                problems.append(error)
        if problems:
            raise problems[0]
