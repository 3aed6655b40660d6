"""Ctrl-A: who is typed to, what is kept for whom, and the way out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from vmm.chardev.backend import Backend
from vmm.chardev.mux import HELP, KEPT_BYTES, Mux, MuxPort
from vmm.chardev.wires import SocketWire

pytestmark = pytest.mark.asyncio


class User:
    """A frontend that takes what it has room for."""

    def __init__(self, port: MuxPort) -> None:
        self.port = port
        self.room = 1 << 20
        self.got = b""
        self.focus: list[bool] = []
        self.opened = 0
        self.told_writable = 0
        port.attach(self)
        port.when_focused(self.focus.append)
        port.when_opened(self.on_opened)

    def on_opened(self) -> None:
        self.opened += 1

    def can_receive(self) -> int:
        return self.room

    def receive(self, data: bytes) -> None:
        assert 0 < len(data) <= self.room
        self.room -= len(data)
        self.got += data

    def backend_writable(self) -> None:
        self.told_writable += 1


class Shared:
    """A mux with two users on a socket, whose other end is ours."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.terminal, inner = socket.socketpair()
        self.terminal.setblocking(False)
        self.exits = 0
        self.backend = Backend("serial0", "test", loop)
        self.mux = Mux(self.backend, self.on_exit)
        self.serial, self.monitor = User(self.mux.new_port(loop)), User(self.mux.new_port(loop))
        self.backend.connect(SocketWire(inner))

    def on_exit(self) -> None:
        self.exits += 1

    async def type(self, data: bytes) -> None:
        """Type, and wait until it has been looked at."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.terminal, data)
        for _ in range(20):
            await asyncio.sleep(0)

    async def shown(self) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.terminal, 65536), 60)

    def close(self) -> None:
        self.backend.close()
        self.terminal.close()


@pytest_asyncio.fixture
async def shared() -> AsyncIterator[Shared]:
    shared = Shared()
    yield shared
    shared.close()


async def test_the_focus_goes_round(shared: Shared) -> None:
    serial, monitor = shared.serial, shared.monitor
    assert (serial.focus, monitor.focus) == ([True], [False])
    assert (serial.opened, monitor.opened) == (1, 1)
    await shared.type(b"ab\x01ccd\x01")
    assert (serial.got, monitor.got) == (b"ab", b"cd")
    await shared.type(b"cef\x01\x01g")
    assert (serial.got, monitor.got) == (b"abef\x01g", b"cd")
    assert (serial.focus, monitor.focus) == ([True, False, True], [False, True, False])


async def test_help_and_exit(shared: Shared) -> None:
    await shared.type(b"\x01h")
    assert await shared.shown() == HELP.encode()
    await shared.type(b"\x01z\x01bx")
    assert (shared.exits, shared.serial.got) == (0, b"x")
    await shared.type(b"\x01x")
    assert await shared.shown() == b"QEMU: Terminated\n\r"
    assert shared.exits == 1


async def test_both_may_write(shared: Shared) -> None:
    assert shared.serial.port.write_nowait(b"guest ") == 6
    assert shared.monitor.port.write_nowait(b"monitor") == 7
    assert await asyncio.to_thread(shared.serial.port.wait_flushed, 10)
    assert await shared.shown() == b"guest monitor"
    while shared.serial.port.write_nowait(b"x" * 4096):
        pass
    told = shared.monitor.told_writable
    async with asyncio.timeout(60):
        while shared.monitor.told_writable == told:
            await shared.shown()


async def test_the_way_out_is_heard_when_the_guest_reads_nothing(shared: Shared) -> None:
    shared.serial.room = 3
    await shared.type(b"x" * 1000 + b"\x01x")
    assert shared.exits == 1
    assert shared.serial.got == b"xxx"
    shared.serial.room = 1 << 20
    await asyncio.to_thread(shared.serial.port.accept_input)
    async with asyncio.timeout(60):
        while len(shared.serial.got) < 1000:
            await asyncio.sleep(0)


async def test_what_is_kept_is_bounded_and_nothing_is_lost(shared: Shared) -> None:
    shared.serial.room = 0
    total = 3 * KEPT_BYTES
    typing = asyncio.ensure_future(shared.type(b"y" * total))
    async with asyncio.timeout(60):
        while len(shared.serial.port.kept) < KEPT_BYTES:
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(shared.serial.port.kept) == KEPT_BYTES
    shared.serial.room = 1 << 20
    shared.serial.port.accept_input()
    async with asyncio.timeout(60):
        while len(shared.serial.got) < total:
            await asyncio.sleep(0)
    await typing
    assert shared.serial.got == b"y" * total
