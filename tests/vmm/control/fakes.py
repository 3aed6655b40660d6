"""Stand-ins for the machine and the migration stack, and a client that needs no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from qmp.fds import FdStore
from qmp.session import Session
from vmm.control.interfaces import FdTaker, Notify
from vmm.control.vocabulary import make_vocabulary
from vmm.control.wiring import Control, build_control
from vmm.cpu.state import reset_values
from vmm.errors import MachineError
from vmm.migration.errors import MigrationRefused
from vmm.migration.params import Capabilities, Parameters
from vmm.ram import GuestRam, RAMBlock
from vmm.vmstate import Values


@dataclass
class FakeBackend:
    length_bytes: int = 1 << 20


@dataclass
class FakeConfig:
    name: str | None = None
    uuid: UUID | None = None
    ram: tuple[FakeBackend, ...] = (FakeBackend(),)


class FakeMachine:
    """Obeys, and remembers what it was told."""

    def __init__(self) -> None:
        self.config = FakeConfig()
        self.ram = GuestRam([RAMBlock("ram", 1 << 20)])
        self.run_state = "prelaunch"
        self.vcpu_is_paused = True
        self.log: list[str] = []
        self.on_shutdown: list[Any] = []
        self.on_hand_over_soon: Any = lambda: None
        self._listeners: list[Notify] = []

    def add_listener(self, notify: Notify) -> None:
        self._listeners.append(notify)

    def notify(self, name: str, **data: Any) -> None:
        for listener in self._listeners:
            listener(name, data)

    def cont(self) -> None:
        self.run_state = "running"
        self.notify("RESUME")

    def stop(self, *, wait_s: float | None = None) -> bool:
        if self.run_state == "running":
            self.run_state = "paused"
            self.notify("STOP")
        return True

    def reset(self, cause: str) -> None:
        self.notify("RESET", guest=False, reason=cause)

    def press_power_button(self) -> None:
        self.log.append("power-button")

    def inject_nmi(self) -> None:
        self.log.append("inject-nmi")

    @contextmanager
    def vcpu_held(self, wait_s: float) -> Iterator[Values]:
        self.log.append("held")
        try:
            yield reset_values(0)
        finally:
            self.log.append("let go")

    def virtual_ranges(self, address: int, length: int, wait_s: float) -> list[tuple[int, int]]:
        if address < 0x1000:
            raise MachineError(f"Invalid addr 0x{address:016x}/size {length} specified")
        return [(address - 0x1000, length)]

    def request_shutdown(self, cause: str, guest: bool) -> None:
        self.notify("SHUTDOWN", guest=guest, reason=cause)
        for callback in self.on_shutdown:
            callback()


def _ram_stats() -> dict[str, Any]:
    names = (
        "transferred remaining total duplicate skipped normal normal-bytes dirty-pages-rate dirty-sync-count "
        "postcopy-requests multifd-bytes pages-per-second precopy-bytes downtime-bytes postcopy-bytes "
        "dirty-sync-missed-zero-copy"
    )
    return {**dict.fromkeys(names.split(), 0), "transferred": 36909, "mbps": 1.2244, "page-size": 4096}


class FakeMigrator:
    """Real capabilities and parameters; everything else refuses as an idle QEMU does."""

    def __init__(self) -> None:
        self._capabilities = Capabilities()
        self.waits_for: tuple[str, int, bool] | None = None
        self._parameters = Parameters()
        self.info: dict[str, Any] = {}
        self.log: list[tuple[Any, ...]] = []
        self.taken_fds: list[int] = []
        self.results = {("source", "completed"): 2, ("destination", "failed"): 1}

    def migrate(
        self,
        uri: str,
        *,
        resume: bool = False,
        blk: bool = False,
        inc: bool = False,
        fds: FdTaker | None = None,
    ) -> None:
        self.log.append(("migrate", uri, resume, blk, inc))
        if uri.startswith("fd:") and fds is not None:
            self.taken_fds.append(fds.take(uri[3:]))
        elif not uri.startswith(("tcp:", "unix:", "exec:", "fd:")):
            raise MigrationRefused("Parameter 'uri' expects a valid migration protocol")

    def incoming(self, uri: str, *, exit_on_error: bool | None = None, fds: FdTaker | None = None) -> None:
        raise MigrationRefused("'-incoming' was not specified on the command line")

    def waited_page(self) -> tuple[str, int, bool] | None:
        return self.waits_for

    def cancel(self) -> None:
        self.log.append(("cancel",))

    def start_postcopy(self) -> None:
        raise MigrationRefused("Enable postcopy with migrate_set_capability before the start of migration")

    def continue_(self, state: str) -> None:
        raise MigrationRefused(f"Migration not in expected state: {self.info.get('status', 'none')}")

    def pause(self) -> None:
        raise MigrationRefused("migrate-pause is currently only supported during postcopy-active state")

    def recover(self, uri: str, *, fds: FdTaker | None = None) -> None:
        raise MigrationRefused("Migrate recover can only be run when postcopy is paused.")

    def take_back(self) -> None: ...

    def query(self) -> dict[str, Any]:
        return self.info

    def pretend_completed(self) -> None:
        self.info = {"status": "completed", "setup-time": 3, "downtime": 0, "total-time": 303}
        self.info["ram"] = _ram_stats()

    def query_capabilities(self) -> list[dict[str, Any]]:
        return self._capabilities.query()

    def set_capabilities(self, capabilities: list[dict[str, Any]]) -> None:
        self._capabilities.set(capabilities)

    def query_parameters(self) -> dict[str, Any]:
        return self._parameters.query()

    def set_parameters(self, parameters: dict[str, Any]) -> None:
        self._parameters.set(parameters)


@dataclass
class FakeVm:
    """The control side over the fakes."""

    machine: FakeMachine
    migrator: FakeMigrator
    control: Control

    def client(self, *, pretty: bool = False) -> FakeClient:
        """A new client of it."""
        return FakeClient(self.control, pretty=pretty)


@contextmanager
def fake_vm(*, hide_unstable: bool = False) -> Iterator[FakeVm]:
    """A VM whose loop does not run: for handlers that answer at once."""
    loop = asyncio.new_event_loop()
    try:
        yield make_vm(loop, hide_unstable=hide_unstable)
    finally:
        loop.close()


def make_vm(loop: asyncio.AbstractEventLoop, *, hide_unstable: bool = False) -> FakeVm:
    """A VM on a loop."""
    machine, migrator = FakeMachine(), FakeMigrator()
    control = build_control(
        machine,
        migrator,
        loop=loop,
        vocabulary=make_vocabulary(hide_unstable=hide_unstable),
        cpu_thread_ids=lambda: [4711],
        chardevs=lambda: [{"label": "mon0", "filename": "unix:/s,server=on", "frontend-open": True}],
    )
    return FakeVm(machine, migrator, control)


@dataclass
class FakeClient:
    """Speaks to a session directly: bytes in, bytes out."""

    control: Control
    pretty: bool = False
    session: Session = field(init=False)
    fds: FdStore = field(default_factory=FdStore)

    def __post_init__(self) -> None:
        self.session = Session(self.control.dispatcher.greeting, pretty=self.pretty)
        self.control.hub.subscribe(self.session.send_event)

    def say(self, data: bytes) -> bytes:
        """Send bytes; what comes back."""
        self.session.receive_data(data)
        while (request := self.session.next_request()) is not None:
            assert self.control.dispatcher.execute(self, request) is None
        return self.session.data_to_send()

    def negotiate(self, *capabilities: str) -> None:
        """Read the greeting and enter command mode."""
        self.session.data_to_send()
        enable = ",".join(f'"{name}"' for name in capabilities)
        answer = self.say(b'{"execute":"qmp_capabilities","arguments":{"enable":[%b]}}' % enable.encode())
        assert answer == b'{"return": {}}\r\n'
