"""What clients that mean harm, or are many, cost the monitor: time, memory and descriptors, measured.

    python -m tools.qmp_limits

Each drill is done to a fresh process over a unix socket that serves all its clients (`x-exclusive=off`),
while a healthy client asks query-status all the time; how long it waited is the drill's latency. Prints a
table.
The tests do the same drills and hold the figures to bounds (`tests/functional/test_monitor_limits.py`).
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import pathlib
import resource
import select
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tools.demo_screen import table
from tools.vm_process import ROOT, VM

Figures = dict[str, float]
QUERY = b'{"execute":"query-status","id":1}\n'
EVENT = b'{"execute":"system_powerdown"}\n'
"""Every client gets an event for it, and it changes nothing."""
MAX_MESSAGE_BYTES = 16 << 20
FDS_A_MESSAGE = 16
"""The kernel closes what a receiver has no room for; ours has for as many as QEMU has."""
DEADLINE_S = 60.0


@dataclass
class Peer:
    """One raw client on the loop."""

    sock: socket.socket
    buffer: bytearray = field(default_factory=bytearray)

    @classmethod
    async def connect(cls, path: pathlib.Path, *, receive_bytes: int | None = None) -> Peer:
        """Connected and negotiated."""
        peer = cls(socket.socket(socket.AF_UNIX))
        peer.sock.setblocking(False)
        if receive_bytes is not None:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    peer.sock.connect(str(path))
                    break
                except (
                    BlockingIOError
                ):  # the backlog is full (asyncio's own sock_connect takes it for a wait)
                    await asyncio.sleep(0.001)
        await peer.line()
        assert await peer.call(b'{"execute":"qmp_capabilities"}\n') == {"return": {}}
        return peer

    async def send(self, data: bytes) -> None:
        """All of it."""
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), DEADLINE_S)

    async def line(self) -> bytes:
        """The next line; b"" at the end."""
        while (end := self.buffer.find(b"\n")) < 0:
            receiving = asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            try:
                data = await asyncio.wait_for(receiving, DEADLINE_S)
            except ConnectionError:
                data = b""
            if not data:
                return b""
            self.buffer += data
        line = bytes(self.buffer[: end + 1])
        del self.buffer[: end + 1]
        return line

    async def call(self, data: bytes) -> dict[str, object]:
        """A command and its reply; events before it are passed over."""
        await self.send(data)
        while "event" in (reply := json.loads(await self.line())):
            pass
        return dict(reply)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


class Healthy:
    """A client that asks all the time, in a process of its own: what else this one does must not delay it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, path: pathlib.Path) -> Healthy:
        """It has had its first answer."""
        command = [sys.executable, "-m", "tools.qmp_limits", "--healthy", str(path)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        return cls(process)

    async def stop(self) -> Figures:
        """The figures of its latency."""
        out, _ = await asyncio.wait_for(self._process.communicate(b""), DEADLINE_S)
        figures: Figures = json.loads(out)
        return figures


def be_healthy(path: str) -> None:
    """The other process: ask until standard input ends, then print the figures."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(path)
        lines = sock.makefile("rb")
        lines.readline()
        sock.sendall(b'{"execute":"qmp_capabilities"}\n')
        lines.readline()
        print("ready", flush=True)
        waits_s = []
        while not select.select([sys.stdin], [], [], 0.001)[0]:
            started = time.perf_counter()
            sock.sendall(QUERY)
            while b"return" not in lines.readline():
                pass
            waits_s.append(time.perf_counter() - started)
        lines.close()
    waits_s.sort()
    figures = {
        "latency_median_ms": waits_s[len(waits_s) // 2] * 1000,
        "latency_p99_ms": waits_s[int(len(waits_s) * 0.99)] * 1000,
        "latency_max_ms": waits_s[-1] * 1000,
    }
    print(json.dumps(figures))


class Target:
    """A fresh VM process and its measurable state."""

    def __init__(self, vm: VM, path: pathlib.Path) -> None:
        self.vm = vm
        self.path = path

    def resident_mb(self) -> float:
        """Its resident memory."""
        status = pathlib.Path(f"/proc/{self.vm.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000

    def peak_mb(self) -> float:
        """The highest it ever was."""
        status = pathlib.Path(f"/proc/{self.vm.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.vm.pid}/fd"))


async def many_clients(target: Target, count: int = 1000, commands: int = 100) -> Figures:
    """All connected at once, then each sends its commands in one go."""
    before = target.resident_mb()
    peers = await asyncio.gather(*(Peer.connect(target.path) for _ in range(count)))
    connected = target.resident_mb()

    async def work(peer: Peer) -> float:
        await peer.send(QUERY * commands)
        for _ in range(commands):
            assert b"return" in await peer.line()
        return time.perf_counter()

    started = time.perf_counter()
    ends = await asyncio.gather(*(work(peer) for peer in peers))
    for peer in peers:
        peer.close()
    return {
        "kilobytes_a_client": (connected - before) / count * 1000,
        "commands_per_s": count * commands / (max(ends) - started),
        "growth_mb": target.peak_mb() - before,
    }


async def stalled_readers(target: Target, count: int = 100, events: int = 5000) -> Figures:
    """Clients that never read, while one client causes events and reads them all."""
    before = target.resident_mb()
    stalled = [await Peer.connect(target.path) for _ in range(count)]
    reader = await Peer.connect(target.path)
    started = time.perf_counter()
    for _ in range(events // 50):
        await reader.send(EVENT * 50)
        seen = 0
        while seen < 50:
            seen += b"return" in await reader.line()
    took = time.perf_counter() - started
    reader.close()
    figures = {"events_per_s": events / took, "growth_mb": target.peak_mb() - before}
    for peer in stalled:
        peer.close()
    return figures


async def many_descriptors(target: Target, count: int = 100_000) -> Figures:
    """Descriptors passed and not taken, then as many clients' worth named and left."""
    before, memory = target.descriptors(), target.resident_mb()
    most = before
    peer = await Peer.connect(target.path)
    null = os.open("/dev/null", os.O_RDONLY)
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    for number in range(count // FDS_A_MESSAGE):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * FDS_A_MESSAGE))]
        while True:
            try:
                peer.sock.sendmsg([b" "], rights)
                break
            except BlockingIOError:
                await asyncio.sleep(0.0005)
        if number % 20 == 0:
            await peer.call(QUERY)
            most = max(most, target.descriptors())
    await peer.call(QUERY)
    took = time.perf_counter() - started
    for number in range(64):
        peer.sock.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null]))])
        await peer.call(b'{"execute":"getfd","arguments":{"fdname":"fd-%d"}}' % number)
    most = max(most, target.descriptors())
    peer.close()
    deadline = loop.time() + DEADLINE_S
    while target.descriptors() > before and loop.time() < deadline:
        await asyncio.sleep(0.005)
    os.close(null)
    return {
        "descriptors_per_s": count / took,
        "most_open": most - before,
        "left_open": target.descriptors() - before,
        "growth_mb": target.peak_mb() - memory,
    }


async def endless_garbage(target: Target, pattern: bytes = b'{"a":[') -> Figures:
    """The same bytes for ever, until the monitor hangs up."""
    before = target.resident_mb()
    peer = await Peer.connect(target.path)
    chunk = pattern * ((1 << 16) // len(pattern))
    sent, started = 0, time.perf_counter()

    async def send() -> None:
        nonlocal sent
        try:
            while True:
                await peer.send(chunk)
                sent += len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass

    sending = asyncio.create_task(send())
    lines = 0
    while line := await peer.line():
        lines += 1
        assert b'"error"' in line, line
    await sending
    peer.close()
    return {
        "until_cut_off_s": time.perf_counter() - started,
        "megabytes_taken": sent / 1e6,
        "replies": lines,
        "growth_mb": target.peak_mb() - before,
    }


async def big_message(target: Target) -> Figures:
    """The longest message that is taken, and one that is a byte too long; then a command."""
    before = target.resident_mb()
    peer = await Peer.connect(target.path)
    head, tail = b'{"execute":"getfd","arguments":{"fdname":"', b'"}}\n'
    room = MAX_MESSAGE_BYTES - len(head) - len(tail) + 1
    started = time.perf_counter()
    reply = await peer.call(head + b"x" * room + tail)
    took = time.perf_counter() - started
    assert "No file descriptor supplied" in str(reply), reply
    reply = await peer.call(head + b"x" * (room + 1) + tail)
    assert "JSON token size limit exceeded" in str(reply), reply
    assert "return" in await peer.call(QUERY)
    peak = target.peak_mb()
    peer.close()
    return {"took_s": took, "growth_mb": peak - before}


DRILLS: dict[str, Callable[[Target], Awaitable[Figures]]] = {
    "1000 clients, 100 commands each": many_clients,
    "100 that never read, 5000 events": stalled_readers,
    "100,000 passed descriptors": many_descriptors,
    "brackets for ever": endless_garbage,
    "a 16 MiB message": big_message,
}


async def drill(work: Callable[[Target], Awaitable[Figures]]) -> Figures:
    """One drill to a fresh process: its figures, and those of the healthy client meanwhile."""
    vm = VM("limits", "-M", "none", "-S")
    path = vm.folder / "all"
    vm.options += ("-qmp", f"unix:{path},server=on,wait=off,x-exclusive=off")
    async with vm:
        target = Target(vm, path)
        healthy = await Healthy.start(path)
        figures = await work(target)
        return figures | await healthy.stop()


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def main() -> None:
    """All drills."""
    raise_descriptor_limit()
    rows = []
    for name, work in DRILLS.items():
        rows.append([name, *cells(await drill(work))])
        print("; ".join(rows[-1]), file=sys.stderr, flush=True)
    print(*table(["drill", "", "memory, MB", "neighbour waits: median, p99, longest, ms"], rows), sep="\n")


def cells(figures: Figures) -> list[str]:
    """What came of it, how much the process grew, how long the client waited that meant no harm."""
    latency = [figures.pop(f"latency_{name}_ms") for name in ("median", "p99", "max")]
    grown = figures.pop("growth_mb")
    outcome = [
        f"{value:,.{0 if value >= 100 else 2}f} {key.replace('_', ' ')}".replace(".00", "")
        for key, value in figures.items()
    ]
    return [", ".join(outcome), f"{grown:.1f}", "  ".join(f"{value:.1f}" for value in latency)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--healthy"]:
        be_healthy(sys.argv[2])
    else:
        asyncio.run(main())
