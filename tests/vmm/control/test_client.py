"""The public `qemu.qmp` client over a unix socket, as management code uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from qmp.address import SocketAddress
from qmp.server import QmpServer
from tests.vmm.control.fakes import make_vm

pytestmark = pytest.mark.asyncio


async def test_a_session_with_qemu_qmp(tmp_path: Path) -> None:
    vm = make_vm(asyncio.get_running_loop())
    server = QmpServer(vm.control.dispatcher, vm.control.hub)
    path = str(tmp_path / "qmp")
    await server.listen(SocketAddress.unix(path, server=True))
    ended = asyncio.Event()
    vm.machine.on_shutdown.append(ended.set)

    client = QMPClient("test")
    await client.connect(path)
    assert await client.execute("query-status") == {
        "status": "prelaunch",
        "singlestep": False,
        "running": False,
    }
    with client.listener() as events:
        await client.execute("cont")
        assert (await events.get())["event"] == "RESUME"
        # From another thread, as the migration threads do.
        await asyncio.to_thread(vm.control.notify, "POSTCOPY_STATE", {"state": "advise"})
        assert (await events.get())["data"] == {"state": "advise"}
    with pytest.raises(ExecuteError, match="only supported during postcopy-active state"):
        await client.execute("migrate-pause", oob=True)
    with pytest.raises(ExecuteError, match="does not support OOB"):
        await client.execute("query-status", oob=True)
    replies = await asyncio.gather(*(client.execute("query-name") for _ in range(50)))
    assert replies == [{}] * 50

    ours, theirs = socket.socketpair()
    client.send_fd_scm(theirs.fileno())
    await client.execute("getfd", {"fdname": "mig"})
    await client.execute("migrate", {"uri": "fd:mig"})
    (fd,) = vm.migrator.taken_fds
    os.write(fd, b"x")
    assert ours.recv(1) == b"x"
    os.close(fd)
    ours.close()
    theirs.close()

    with client.listener("SHUTDOWN") as events:
        await client.execute("quit")
        assert (await events.get())["data"] == {"guest": False, "reason": "host-qmp-quit"}
    await ended.wait()
    await server.close()
    # The server hung up first, as it should; the client reports that once.
    with contextlib.suppress(EOFError):
        await client.disconnect()
