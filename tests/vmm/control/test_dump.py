"""dump-guest-memory: what is written, what is refused, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import os
import pathlib
from typing import Any

import pytest

from qmp.errors import GenericError
from qmp.fds import FdStore
from qmp.fdsets import FdSets
from tests.vmm.control.fakes import FakeMachine, FakeMigrator
from vmm.control.core_file import core_head
from vmm.control.dump import handlers
from vmm.cpu.state import reset_values
from vmm.errors import MachineError
from vmm.ram import PageNotReceived

pytestmark = pytest.mark.asyncio
MIB = 1 << 20


class FakeClient:
    def __init__(self) -> None:
        self.fds = FdStore()


class FakeCall:
    def __init__(self, **arguments: Any) -> None:
        self.client = FakeClient()
        self.arguments = {"paging": False, **arguments}


class Bench:
    def __init__(self) -> None:
        self.machine, self.migrator = FakeMachine(), FakeMigrator()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.handlers = handlers(
            self.machine, self.migrator, FdSets(), lambda name, data: self.events.append((name, data))
        )
        self.machine.ram.write(0x5000, b"hello")

    def dump(self, call: FakeCall) -> Any:
        return self.handlers["dump-guest-memory"](call)  # type: ignore[arg-type]  # enough of a Call

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.handlers["query-dump"](FakeCall())  # type: ignore[arg-type]  # as above
        return found


async def test_head_and_ram(tmp_path: pathlib.Path) -> None:
    bench, path = Bench(), tmp_path / "core"
    assert bench.status()["status"] == "none"
    await bench.dump(FakeCall(protocol=f"file:{path}"))
    head = core_head(reset_values(0), [(0, MIB)])
    assert path.read_bytes() == head + bench.machine.ram.read(0, MIB)
    done = {"status": "completed", "completed": MIB, "total": MIB}
    assert bench.status() == done
    assert bench.events == [("DUMP_COMPLETED", {"result": done})]
    assert bench.machine.log == ["held", "let go"]


async def test_a_pipe_that_nobody_reads_keeps_nobody_waiting() -> None:
    bench, call = Bench(), FakeCall(protocol="fd:core", detach=True)
    read_fd, write_fd = os.pipe()
    call.client.fds.receive([write_fd])
    call.client.fds.name_received("core")
    assert bench.dump(call) is None
    assert bench.status()["status"] == "active"
    with pytest.raises(GenericError, match="There is a dump in process, please wait"):
        bench.dump(FakeCall(protocol="file:/dev/null"))
    with open(read_fd, "rb") as pipe:
        data = await asyncio.to_thread(pipe.read)
    assert data[-MIB + 0x5000 :].startswith(b"hello")
    while not bench.events:
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"paging": True, "protocol": "file:/x"}, "Parameter 'paging' expects false"),
        ({"protocol": "tcp:x"}, "Invalid parameter 'protocol'"),
        ({"protocol": "fd:x"}, "File descriptor named 'x' has not been found"),
        ({"protocol": "file:/nowhere/x"}, "Could not open '/nowhere/x': No such file"),
        ({"protocol": "file:/x", "begin": 0, "length": 1}, "Parameter 'begin' is not supported"),
        ({"protocol": "file:/x", "format": "win-dmp"}, "Parameter 'format' expects 'elf'"),
    ],
)
async def test_refusals(arguments: dict[str, Any], text: str) -> None:
    bench = Bench()
    with pytest.raises((GenericError, MachineError), match=text):
        bench.dump(FakeCall(**arguments))
    assert bench.machine.log == []


async def test_not_during_a_migration() -> None:
    bench = Bench()
    bench.migrator.info = {"status": "postcopy-active"}
    with pytest.raises(MachineError, match="while a migration is under way"):
        bench.dump(FakeCall(protocol="file:/dev/null"))
    bench.migrator.info = {}
    bench.machine.run_state = "inmigrate"
    with pytest.raises(MachineError, match="Dump not allowed during incoming migration"):
        bench.dump(FakeCall(protocol="file:/dev/null"))


async def test_a_page_that_is_not_here_ends_it(tmp_path: pathlib.Path) -> None:
    bench = Bench()
    bench.machine.ram.set_read_guard(lambda block, first, count: False)
    with pytest.raises(PageNotReceived):
        await bench.dump(FakeCall(protocol=f"file:{tmp_path / 'core'}"))
    assert bench.status()["status"] == "failed"
    assert "not all been received" in bench.events[0][1]["error"]
    assert bench.machine.log == ["held", "let go"]
