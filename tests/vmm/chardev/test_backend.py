"""Character backends: bounded, in order, flow-controlled, and without a wait on the writer's side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import pty
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Awaitable, Callable

import pytest

from vmm.chardev.backend import QUEUE_BYTES, Backend
from vmm.chardev.registry import Chardevs
from vmm.chardev.sockets import SocketBackend
from vmm.chardev.wires import FdWire, SocketWire
from vmm.config import ChardevConfig
from vmm.errors import ChardevError

DEADLINE_S = 60.0


class Frontend:
    """A UART with as much room as it is told."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.input = bytearray()
        self.writable = asyncio.Event()

    def can_receive(self) -> int:
        return self.room

    def receive(self, data: bytes) -> None:
        assert len(data) <= self.room
        self.room -= len(data)
        self.input += data

    def backend_writable(self) -> None:
        self.writable.set()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def joined() -> tuple[Backend, Frontend, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    backend, frontend = Backend("c", "test", asyncio.get_running_loop()), Frontend()
    backend.connect(SocketWire(ours))
    backend.attach(frontend)
    return backend, frontend, theirs


def test_a_full_backend_says_so_and_loses_nothing() -> None:
    async def test() -> None:
        backend, frontend, outside = joined()
        sent = bytearray()
        while True:
            data = os.urandom(1000)
            taken = backend.write_nowait(data)
            sent += data[:taken]
            if taken < len(data):
                break
        assert len(sent) == QUEUE_BYTES
        assert backend.write_nowait(b"x") == 0
        got = bytearray()
        while len(got) < len(sent):
            got += await asyncio.get_running_loop().sock_recv(outside, 700)
        assert got == sent
        await frontend.writable.wait()
        assert backend.write_nowait(b"x") == 1
        backend.close()
        outside.close()

    run(test)


def test_the_writer_may_be_another_thread_and_wait_for_the_flush() -> None:
    async def test() -> None:
        backend, _, outside = joined()
        flushed: list[bool] = []

        def write() -> None:
            for byte in range(256):
                assert backend.write_nowait(bytes((byte,))) == 1
            flushed.append(backend.wait_flushed(DEADLINE_S))

        thread = threading.Thread(target=write)
        thread.start()
        got = bytearray()
        while len(got) < 256:
            got += await asyncio.get_running_loop().sock_recv(outside, 700)
        assert got == bytes(range(256))
        await until(lambda: bool(flushed))
        thread.join()
        assert flushed == [True]
        backend.close()
        outside.close()

    run(test)


def test_a_flush_that_cannot_be_ends_in_time() -> None:
    async def test() -> None:
        backend, _, outside = joined()
        backend.write_nowait(b"x")
        assert not backend.wait_flushed(0.01)  # the loop is right here, busy with us
        await backend.drain(DEADLINE_S)
        assert outside.recv(9) == b"x"
        backend.close()
        outside.close()

    run(test)


def test_input_waits_for_room() -> None:
    async def test() -> None:
        backend, frontend, outside = joined()
        frontend.room = 3
        backend.accept_input()
        outside.send(b"abcdef")
        await until(lambda: frontend.input == b"abc")
        await asyncio.sleep(0)
        frontend.room = 2
        backend.accept_input()
        await until(lambda: frontend.input == b"abcde")
        frontend.room = 9
        backend.accept_input()
        await until(lambda: frontend.input == b"abcdef")
        backend.close()
        outside.close()

    run(test)


def test_with_nobody_there_output_is_dropped() -> None:
    async def test() -> None:
        backend, frontend, outside = joined()
        while backend.write_nowait(bytes(1000)) == 1000:
            pass
        outside.close()
        await until(lambda: not backend.is_open)
        await frontend.writable.wait()
        assert backend.write_nowait(bytes(100000)) == 100000
        assert backend.wait_flushed(0)
        backend.close()

    run(test)


def config(tmp_path: pathlib.Path, **more: object) -> ChardevConfig:
    values = {"path": str(tmp_path / "s"), "server": True, "wait": False, **more}
    return ChardevConfig("c", "socket", "-chardev socket,id=c", **values)  # type: ignore[arg-type]  # a table


def test_a_listening_socket_serves_one_after_the_other(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        loop, frontend = asyncio.get_running_loop(), Frontend()
        backend = SocketBackend(config(tmp_path), loop)
        await backend.open()
        backend.attach(frontend)
        assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600
        for text in (b"one", b"two"):
            frontend.input.clear()
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            await backend.wait_client()
            writer.write(text)
            await until(lambda text=text: frontend.input == text)  # type: ignore[misc]  # binds the name
            backend.write_nowait(b"back")
            assert await reader.readexactly(4) == b"back"
            writer.close()
            await writer.wait_closed()
            await until(lambda: not backend.is_open)
        backend.close()
        assert not (tmp_path / "s").exists()

    run(test)


def test_connecting_out(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            backend = SocketBackend(
                ChardevConfig("c", "socket", "", host="127.0.0.1", port=port, nodelay=True), loop
            )
            await backend.open()
            peer, _ = server.accept()
            with peer:
                backend.write_nowait(b"x")
                await backend.drain(DEADLINE_S)
                assert peer.recv(1) == b"x"
            backend.close()
        backend = SocketBackend(ChardevConfig("c", "socket", "", path=str(tmp_path / "no")), loop)
        with pytest.raises(OSError, match=r"Failed to connect to 'unix:.*no': No such file"):
            await backend.open()

    run(test)


def test_connecting_again(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        backend = SocketBackend(config(tmp_path, server=False, reconnect_s=1), loop)
        await backend.open()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s"))
            server.listen(1)
            await until(lambda: backend.is_open)
            backend.close()

    run(test)


def test_an_inherited_socket() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        backend = SocketBackend(
            ChardevConfig("c", "socket", "", fd=ours.detach()), asyncio.get_running_loop()
        )
        await backend.open()
        backend.write_nowait(b"x")
        await backend.drain(DEADLINE_S)
        assert theirs.recv(1) == b"x"
        backend.close()
        theirs.close()

    run(test)


def test_files(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        path = tmp_path / "out"
        for append, text in ((False, b"one"), (True, b"oneone"), (False, b"one")):
            chardev = ChardevConfig("c", "file", "-serial file:", path=str(path), append=append)
            chardevs = Chardevs((chardev,), loop)
            backend = await chardevs.open("c")
            backend.attach(Frontend())
            backend.write_nowait(b"one")
            await chardevs.drain(DEADLINE_S)
            chardevs.close()
            assert path.read_bytes() == text
        bad = Chardevs((ChardevConfig("c", "file", "-serial file:x", path=str(tmp_path)),), loop)
        with pytest.raises(ChardevError, match=r"-serial file:x: Could not open .*: Is a directory"):
            await bad.open("c")

    run(test)


def test_null_and_the_list_of_all(tmp_path: pathlib.Path) -> None:
    async def test() -> None:
        chardevs = Chardevs((ChardevConfig("n", "null", ""), config(tmp_path)), asyncio.get_running_loop())
        backend = await chardevs.open("n")
        assert backend.write_nowait(b"x" * 10000) == 10000
        assert [entry["filename"] for entry in chardevs.describe()] == [
            "null",
            f"unix:{tmp_path / 's'},server=on",
        ]
        chardevs.close()

    run(test)


def test_a_blocking_descriptor_is_asked_first() -> None:
    reader, writer = os.pipe()
    wire = FdWire(None, writer, blocking_write=True)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while written < 1 << 20:
            count = wire.write(bytes(100000))
            assert count <= 512
            written += count
    assert written < 1 << 20
    wire.close()
    os.close(reader)


@pytest.mark.parametrize("controlling", [False, True])
def test_the_terminal_is_given_back(controlling: bool) -> None:
    outer, inner = pty.openpty()
    code = (
        "import os, sys, termios\n"
        "from vmm.chardev.terminal import Terminal\n"
        "fd, controlling = int(sys.argv[1]), sys.argv[2] == 'True'\n"
        "controlling and os.close(os.open(os.ttyname(fd), os.O_RDWR))\n"
        "before = termios.tcgetattr(fd)\n"
        "terminal = Terminal(fd, signals=False)\n"
        "assert not termios.tcgetattr(fd)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)\n"
        "controlling or terminal.restore()\n"
        "assert controlling or termios.tcgetattr(fd) == before\n"
    )
    try:
        before = termios.tcgetattr(inner)
        command = [sys.executable, "-c", code, str(inner), str(controlling)]
        subprocess.run(command, pass_fds=[inner], start_new_session=True, check=True, timeout=DEADLINE_S)
        assert termios.tcgetattr(inner) == before
    finally:
        os.close(outer)
        os.close(inner)
