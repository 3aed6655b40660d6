"""QEMU's own `qmp-shell`, in both of its modes, against a server over the fakes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from qmp.address import SocketAddress
from qmp.server import QmpServer
from tests.vmm.control.fakes import make_vm

pytestmark = pytest.mark.asyncio


async def run_shell(path: Path, typed: bytes, *options: str) -> str:
    """What qmp-shell prints."""
    start = "from qemu.qmp.qmp_shell import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        start,
        *options,
        str(path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(typed), 30)
    return out.decode()


async def test_both_modes(tmp_path: Path) -> None:
    vm = make_vm(asyncio.get_running_loop())
    server = QmpServer(vm.control.dispatcher, vm.control.hub)
    path = tmp_path / "qmp"
    await server.listen(SocketAddress.unix(str(path), server=True))
    out = await run_shell(path, b"query-status\nmigrate-set-parameters downtime-limit=5\nquery-nothing\n")
    assert "Connected to QEMU 7.2.22" in out
    assert '"status": "prelaunch"' in out
    assert "The command query-nothing has not been found" in out
    assert vm.migrator.query_parameters()["downtime-limit"] == 5
    out = await run_shell(path, b"info status\nhelp stop\n", "-H")
    assert "VM status: paused (prelaunch)" in out
    assert "stop|s  -- stop emulation" in out
    await server.close()
