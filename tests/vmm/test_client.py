"""The typed client against the real vocabulary over fakes, and every query through its types."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from qmp.address import SocketAddress
from qmp.client import CommandFailed
from qmp.server import QmpServer
from tests.vmm.control.fakes import FakeVm, make_vm
from vmm import client as typed
from vmm.client import Client, MigrationCapabilityStatus, MigrationEvent, StopEvent, UnknownEvent

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def vm(tmp_path: Path) -> AsyncIterator[FakeVm]:
    vm = make_vm(asyncio.get_running_loop())
    server = QmpServer(vm.control.dispatcher, vm.control.hub)
    await server.listen(SocketAddress.unix(str(tmp_path / "qmp"), server=True))
    yield vm
    await server.close()


async def test_commands_and_replies(vm: FakeVm, tmp_path: Path) -> None:
    async with await Client.connect(str(tmp_path / "qmp")) as client:
        status = await client.query_status()
        assert (status.status, status.running) == ("prelaunch", False)
        assert (await client.query_version()).qemu.major == 7
        on = [MigrationCapabilityStatus(capability="events", state=True)]
        await client.migrate_set_capabilities(on)
        states = {each.capability: each.state for each in await client.query_migrate_capabilities()}
        assert (states["events"], states["xbzrle"]) == (True, False)
        await client.migrate_set_parameters(downtime_limit=5, tls_creds=None, max_bandwidth=77)
        parameters = await client.query_migrate_parameters()
        assert (parameters.downtime_limit, parameters.max_bandwidth) == (5, 77)
        assert (await client.query_migrate()).status is None
        vm.migrator.pretend_completed()
        info = await client.query_migrate()
        assert (info.status, info.total_time) == ("completed", 303)
        assert info.ram is not None
        assert info.ram.page_size == 4096
        assert await client.human_monitor_command("info name") == ""
        assert [each.label for each in await client.query_chardev()] == ["mon0"]
        with pytest.raises(CommandFailed, match="only supported during postcopy-active"):
            await client.migrate_pause(oob=True)


async def test_descriptors(vm: FakeVm, tmp_path: Path) -> None:
    async with await Client.connect(str(tmp_path / "qmp")) as client:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await client.getfd("mig", fds=[theirs.fileno()])
            await client.migrate("fd:mig")
            os.close(vm.migrator.taken_fds[0])
            added = await client.add_fd(opaque="x", fds=[theirs.fileno()])
            assert [(each.fdset_id, each.fds[0].opaque) for each in await client.query_fdsets()] == [
                (added.fdset_id, "x")
            ]
            await client.remove_fd(added.fdset_id)


async def test_events(vm: FakeVm, tmp_path: Path) -> None:
    async with await Client.connect(str(tmp_path / "qmp")) as client:
        events = client.events()
        vm.machine.notify("STOP")
        vm.control.notify("MIGRATION", {"status": "active"})
        vm.control.notify("MIGRATION_PASS", {"pass": 3})
        first = await anext(events)
        assert isinstance(first, StopEvent)
        assert first.timestamp_s > 1_600_000_000
        second = await anext(events)
        assert isinstance(second, MigrationEvent)
        assert second.status == "active"
        third = await anext(events)
        assert isinstance(third, typed.MigrationPassEvent)
        assert third.pass_ == 3
        events.close()
    stamp = {"seconds": 1, "microseconds": 500_000}
    unknown = typed.event_from_wire({"event": "NEW", "timestamp": stamp, "data": {"a": 1}})
    assert unknown == UnknownEvent(name="NEW", timestamp_s=1.5, data={"a": 1})


async def test_every_query(vm: FakeVm, tmp_path: Path) -> None:
    vm.migrator.pretend_completed()
    async with await Client.connect(str(tmp_path / "qmp")) as client:
        queries = [name for name, _ in inspect.getmembers(client, inspect.iscoroutinefunction)]
        # There is no balloon to be asked.
        queries = [name for name in queries if name.startswith("query_") and name != "query_balloon"]
        assert len(queries) > 10
        for name in queries:
            assert await getattr(client, name)() is not None, name
