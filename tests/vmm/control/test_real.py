"""The control side on the real machine and migrator, through a whole precopy between two of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.qmp.validation import Judge
from tests.support.requires import requires
from tests.vmm.control.fakes import FakeClient
from vmm.config import BackendConfig, MachineConfig
from vmm.control.interfaces import MachineControl, MigratorControl
from vmm.control.wiring import Control, build_control
from vmm.machine import Machine
from vmm.migration.migrator import Migrator

pytestmark = pytest.mark.asyncio


class Vm:
    """A machine without a guest program, its migrator, and a client of both."""

    def __init__(self, incoming: str | None = None) -> None:
        ram = (BackendConfig("ram", 1 << 20),)
        config = MachineConfig(machine_type="none", ram=ram, start_paused=True, incoming=incoming, name="vm")
        self.machine = Machine(config)
        self.migrator = Migrator(self.machine, lambda name, data: self.control.notify(name, data))
        as_machine: MachineControl = self.machine
        as_migrator: MigratorControl = self.migrator
        loop = asyncio.get_running_loop()
        self.control: Control = build_control(as_machine, as_migrator, loop=loop)
        self.judge = Judge(self.control.dispatcher.schema)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.control.hub.subscribe(lambda event, line: self._on_event(event))
        self.client = FakeClient(self.control)
        self.client.negotiate()
        self.machine.start()

    def _on_event(self, event: dict[str, Any]) -> None:
        self.judge.check_event(event)
        self.events.append((event["event"], event.get("data", {})))

    def call(self, name: str, **arguments: Any) -> Any:
        """The result of a command, which must fit the schema, or the text of its error."""
        names = {key.replace("_", "-"): value for key, value in arguments.items()}
        answer = self.client.say(json.dumps({"execute": name, "arguments": names, "id": 0}).encode())
        for line in answer.split(b"\r\n"):
            reply = json.loads(line) if line else {}
            if "error" in reply:
                return reply["error"]["desc"]
            if "return" in reply:
                self.judge.check_return(name, reply["return"])
                return reply["return"]
        raise AssertionError(answer)

    async def wait_status(self, *wanted: str) -> dict[str, Any]:
        """query-migrate's reply once the migration has that status."""
        for _ in range(2000):
            info: dict[str, Any] = self.call("query-migrate")
            if info.get("status") in wanted:
                return info
            await asyncio.sleep(0.005)
        raise AssertionError(f"the status stayed {info}")

    def close(self) -> None:
        self.migrator.shutdown(5)
        assert self.machine.close(5)


@pytest_asyncio.fixture
async def vms() -> AsyncIterator[tuple[Vm, Vm]]:
    requires("uffd")
    pair = Vm(), Vm(incoming="defer")
    yield pair
    for vm in pair:
        vm.close()


async def test_every_query_fits_the_schema(vms: tuple[Vm, Vm]) -> None:
    vm = vms[0]
    for name in vm.control.dispatcher.schema.commands:
        if name.startswith("query-") and name != "query-balloon":
            assert not isinstance(vm.call(name), str)
    assert vm.call("query-status")["status"] == "prelaunch"
    assert len(vm.call("query-cpus-fast")) >= 1
    assert vm.call("query-memory-size-summary")["base-memory"] == 1 << 20
    assert vm.call("human-monitor-command", command_line="info name") == "vm\r\n"


async def test_misuse_is_refused(vms: tuple[Vm, Vm]) -> None:
    source, destination = vms
    assert source.call("migrate", uri="zzz:1") == "Parameter 'uri' expects a valid migration protocol"
    assert source.call("migrate-incoming", uri="tcp:127.0.0.1:0") == (
        "'-incoming' was not specified on the command line"
    )
    assert source.call("migrate", uri="fd:nope") == "File descriptor named 'nope' has not been found"
    assert destination.call("migrate", uri="tcp:127.0.0.1:1") == "Guest is waiting for an incoming migration"
    assert destination.call("migrate-incoming", uri="foo:") == "unknown migration protocol: foo:"
    assert isinstance(destination.call("migrate-incoming", uri="unix:/no/such/directory/s"), str)


async def test_precopy_over_qmp(vms: tuple[Vm, Vm], tmp_path: Path) -> None:
    source, destination = vms
    uri = f"unix:{tmp_path / 'mig'}"
    for vm in vms:
        capabilities = [{"capability": "events", "state": True}]
        assert vm.call("migrate-set-capabilities", capabilities=capabilities) == {}
    assert destination.call("migrate-incoming", uri=uri) == {}
    assert source.call("migrate", uri=uri) == {}
    info = await source.wait_status("completed")
    assert info["ram"]["total"] == 1 << 20
    await destination.wait_status("completed")
    assert source.call("query-status")["status"] == "postmigrate"
    assert "Migration status: completed" in source.call("human-monitor-command", command_line="info migrate")
    statuses = [data["status"] for name, data in source.events if name == "MIGRATION"]
    assert statuses[0] == "setup"
    assert statuses[-1] == "completed"
    assert ("MIGRATION_PASS", {"pass": 1}) in source.events
