"""A program for latency tests: two migrations without an end, in one process with a QMP socket and HTTP.

Usage: python -m tests.support.busy_process FOLDER. In FOLDER: `qmp` and `http`, unix sockets. It prints
"busy" once both guests have been sent a first time, and ends when its standard input does, with a line that
says how often they were. Each guest writes to all its RAM without a pause, and is sent at full speed, over
and over: one migration alone would end as soon as the processors are too busy for its guest to write any.
"""

from __future__ import annotations

import asyncio
import pathlib
import sys
import threading

from qmp.address import SocketAddress
from qmp.server import QmpServer
from tests.support.real_machines import MIB, Side
from vmm.app import SWITCH_INTERVAL_S
from vmm.config import HttpConfig
from vmm.control.http import HttpControl
from vmm.control.wiring import build_control

GUEST = "start=0x100000 end=0x1100000"
MEMORY_BYTES = 32 * MIB


class Sender:
    """Sends one guest over and over."""

    def __init__(self) -> None:
        self.side = Side("dirtier", GUEST, memory=MEMORY_BYTES)
        self.count = 0
        self.sent = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sender")
        self._thread.start()

    def _run(self) -> None:
        self.side.migrator.set_parameters({"max-bandwidth": 0})
        while not self._stop.is_set():
            since = len(self.side.events)
            self.side.migrator.migrate("exec:cat > /dev/null")
            self.side.wait("completed", since=since)
            self.count += 1
            self.sent.set()
            self.side.machine.cont()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.side.close()


async def main(folder: pathlib.Path) -> None:
    """Until standard input ends."""
    loop = asyncio.get_running_loop()
    senders = [Sender(), Sender()]
    shown = senders[0].side
    control = build_control(shown.machine, shown.migrator, loop=loop)
    server = QmpServer(control.dispatcher, control.hub)
    await server.listen(SocketAddress.unix(str(folder / "qmp"), server=True))
    config = HttpConfig("-http", path=str(folder / "http"))
    http = HttpControl(config, control, shown.machine, shown.migrator, lambda: server.client_count)
    await http.open()
    http.release()
    for sender in senders:
        await asyncio.to_thread(sender.sent.wait)
    print("busy", flush=True)
    before = [sender.count for sender in senders]
    await asyncio.to_thread(sys.stdin.read)
    print(*(sender.count - count for sender, count in zip(senders, before, strict=True)), flush=True)
    await http.close(0.1)
    await server.close(0.1)
    for sender in senders:
        await asyncio.to_thread(sender.close)


if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    asyncio.run(main(pathlib.Path(sys.argv[1])))
