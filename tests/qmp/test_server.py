"""Real sockets and pipes: one client at a time, descriptors, end of input, back-pressure, rights on files."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmp.address import SocketAddress
from qmp.connection import HIGH_WATER_BYTES, Connection
from qmp.dispatcher import Call, Dispatcher
from qmp.events import EventHub
from qmp.schema import Schema
from qmp.server import QmpServer
from qmp.turns import Turns
from qmp.wire import SocketWire

pytestmark = pytest.mark.asyncio

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}}
ENABLE = {"type": "object", "properties": {"enable": {"type": "array", "items": {"type": "string"}}}}
FDNAME = {"type": "object", "properties": {"fdname": {"type": "string"}}}
COUNT = {"type": "object", "properties": {"n": {"type": "integer"}}}
DOCUMENT = {
    "commands": {
        "qmp_capabilities": {"arguments": ENABLE},
        "echo": {"arguments": TEXT, "returns": {"type": "string"}},
        "wait": {},
        "go": {"oob": True},
        "crash": {},
        "bad-result": {},
        "refuse": {},
        "getfd": {"arguments": FDNAME},
    },
    "events": {"TICK": {"data": COUNT}},
}
SCHEMA = Schema({"test.json": json.dumps(DOCUMENT).encode()})


class Refused(Exception):
    """What the layer below may say."""


def explain(error: Exception) -> str | None:
    return str(error) if isinstance(error, Refused) else None


class Server:
    """A QmpServer with a few commands."""

    def __init__(self) -> None:
        self.hub = EventHub(SCHEMA)
        self.gate = asyncio.Event()
        self.dispatcher = Dispatcher(SCHEMA, {"qemu": {}}, explain=explain)
        for name in ("qmp_capabilities", "echo", "wait", "go", "crash", "bad-result", "refuse", "getfd"):
            self.dispatcher.register(name, getattr(self, "on_" + name.replace("-", "_")))
        self.qmp = QmpServer(self.dispatcher, self.hub)

    def on_qmp_capabilities(self, call: Call) -> None:
        call.client.session.negotiate(call.arguments.get("enable", []))

    def on_echo(self, call: Call) -> str:
        return str(call.arguments["text"])

    async def on_wait(self, call: Call) -> None:
        await self.gate.wait()

    def on_go(self, call: Call) -> None:
        self.gate.set()

    def on_crash(self, call: Call) -> None:
        raise ZeroDivisionError("oops")

    def on_bad_result(self, call: Call) -> object:
        return object()

    def on_refuse(self, call: Call) -> None:
        raise Refused("Not now")

    def on_getfd(self, call: Call) -> None:
        call.client.fds.name_received(call.arguments["fdname"])


class Client:
    """A blocking socket's worth of QMP on the loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._buffer = b""

    @classmethod
    async def open(cls, path: Path, *capabilities: str) -> Client:
        client = cls(socket.socket(socket.AF_UNIX))
        await client._loop.sock_connect(client.sock, str(path))
        assert "QMP" in await client.line()
        await client.send(json.dumps({"execute": "qmp_capabilities", "arguments": {"enable": capabilities}}))
        assert await client.line() == {"return": {}}
        return client

    async def send(self, text: str) -> None:
        await self._loop.sock_sendall(self.sock, text.encode())

    async def line(self) -> Any:
        """The next object, or None at the end."""
        while b"\r\n" not in self._buffer:
            data = await asyncio.wait_for(self._loop.sock_recv(self.sock, 65536), 60)
            if not data:
                assert self._buffer == b""
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return json.loads(line)

    async def call(self, name: str, **arguments: Any) -> Any:
        await self.send(json.dumps({"execute": name, "arguments": arguments}))
        return await self.line()

    def send_fds(self, data: bytes, *fds: int) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self.sock.sendmsg([data], [rights])

    def close(self) -> None:
        self.sock.close()


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server()
    await server.qmp.listen(SocketAddress.unix(str(tmp_path / "qmp"), server=True))
    yield server
    await server.qmp.close()


async def test_socket_file_is_private_and_removed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # A socket that was left behind is replaced; one that replaced ours is not removed.
    other = Server()
    await other.qmp.listen(SocketAddress.unix(str(path), server=True))
    await server.qmp.close()
    assert path.exists()
    await other.qmp.close()
    assert not path.exists()


async def test_the_second_client_waits_for_the_first_to_leave(server: Server, tmp_path: Path) -> None:
    first = await Client.open(tmp_path / "qmp")
    waiting = Client(socket.socket(socket.AF_UNIX))
    await waiting._loop.sock_connect(waiting.sock, str(tmp_path / "qmp"))
    greeting = asyncio.ensure_future(waiting.line())
    assert await first.call("echo", text="a") == {"return": "a"}
    assert not greeting.done()
    first.close()
    assert "QMP" in await greeting
    assert server.qmp.client_count == 1
    waiting.close()


async def test_many_clients_if_asked_for(tmp_path: Path) -> None:
    server = Server()
    await server.qmp.listen(SocketAddress.unix(str(tmp_path / "qmp"), server=True, exclusive=False))
    clients = [await Client.open(tmp_path / "qmp") for _ in range(20)]
    server.hub.emit("TICK", {"n": 1})
    for client in clients:
        assert (await client.line())["data"] == {"n": 1}
        client.close()
    await server.qmp.close()


async def test_out_of_band_overtakes_a_command_that_waits(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp", "oob")
    await client.send('{"execute":"wait","id":1}{"execute":"echo","arguments":{"text":"x"},"id":2}')
    await client.send('{"exec-oob":"go","id":3}')
    assert [(await client.line())["id"] for _ in range(3)] == [3, 1, 2]
    client.close()


async def test_half_close_is_answered_in_full(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    await client.send('{"execute":"wait","id":1}{"execute":"echo","arguments":{"text":"x"},"id":2}{"exec')
    client.sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(0)
    server.gate.set()
    assert [(await client.line())["id"] for _ in range(2)] == [1, 2]
    assert await client.line() is None
    client.close()


async def test_a_crashing_handler_is_an_error_reply(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await Client.open(tmp_path / "qmp")
    reply = await client.call("crash")
    assert reply["error"]["desc"] == "Internal error in command 'crash': ZeroDivisionError: oops"
    assert "Traceback" in caplog.text
    assert "not JSON serializable" in (await client.call("bad-result"))["error"]["desc"]
    assert (await client.call("refuse"))["error"] == {"class": "GenericError", "desc": "Not now"}
    assert await client.call("echo", text="still here") == {"return": "still here"}
    client.close()


async def test_passed_descriptors_are_closed_at_the_end(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    ends = [os.pipe() for _ in range(3)]
    client.send_fds(b" ", ends[0][1], ends[1][1])
    await client.send('{"execute":"getfd","arguments":{"fdname":"a"}}')
    assert await client.line() == {"return": {}}
    client.send_fds(b'{"execute":"getfd","arguments":{"fdname":"b"}}', ends[2][1])
    assert await client.line() == {"return": {}}
    for _, write_end in ends:
        os.close(write_end)
    client.close()
    for read_end, _ in ends:
        # End of file once the server has closed its copy of the write end.
        assert await asyncio.to_thread(os.read, read_end, 1) == b""
        os.close(read_end)


async def test_many_descriptors_do_not_pile_up(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    before = len(os.listdir("/proc/self/fd"))
    fd = os.open("/dev/null", os.O_RDONLY)
    for _ in range(200):
        client.send_fds(b"\n" * 10, *[fd] * 10)
        assert await client.call("echo", text="x") == {"return": "x"}
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) <= before + 20
    client.close()


async def test_a_client_that_does_not_read_is_not_read(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    request = json.dumps({"execute": "echo", "arguments": {"text": "x" * 50000}})
    sender = asyncio.ensure_future(client.send(request * 100))
    connection = next(iter(server.qmp._connections))
    while connection._unsent_bytes() <= HIGH_WATER_BYTES:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert connection._unsent_bytes() <= HIGH_WATER_BYTES + 100_000
    for _ in range(100):
        assert (await client.line())["return"] == "x" * 50000
    await sender
    client.close()


async def test_a_client_that_lets_events_pile_up_is_disconnected(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    for number in range(40_000):
        server.hub.emit("TICK", {"n": number})
    await asyncio.sleep(0)
    assert server.qmp.client_count == 0
    numbers = []
    with contextlib.suppress(AssertionError):
        while (line := await client.line()) is not None:
            numbers.append(line["data"]["n"])
    assert numbers == list(range(len(numbers)))
    client.close()


async def test_a_flood_of_commands_lets_others_in(tmp_path: Path) -> None:
    server = Server()
    await server.qmp.listen(SocketAddress.unix(str(tmp_path / "qmp"), server=True, exclusive=False))
    flooder, other = await Client.open(tmp_path / "qmp"), await Client.open(tmp_path / "qmp")
    flood = asyncio.ensure_future(flooder.send('{"execute":"echo","arguments":{"text":"x"}}' * 20_000))
    reading = asyncio.ensure_future(_read(flooder, 20_000))
    for _ in range(10):
        assert await other.call("echo", text="y") == {"return": "y"}
    assert not reading.done()
    await flood
    await reading
    flooder.close()
    other.close()
    await server.qmp.close()


async def _read(client: Client, count: int) -> None:
    for _ in range(count):
        await client.line()


async def test_tcp_binds_loopback_and_clients_may_listen() -> None:
    server = Server()
    listener = await server.qmp.listen(SocketAddress.tcp("", 0, server=True))
    assert listener.getsockname()[0] == "127.0.0.1"
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    assert b"QMP" in await reader.readline()
    writer.close()
    await writer.wait_closed()
    # The other way round: the emulator connects out, as for QEMU's own test tools.
    greeted = asyncio.Event()

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"QMP" in await reader.readline()
        greeted.set()
        writer.close()

    front = await asyncio.start_server(on_client, "127.0.0.1", 0)
    connection = await server.qmp.connect(SocketAddress.tcp(*front.sockets[0].getsockname()))
    await asyncio.wait_for(greeted.wait(), 60)
    assert connection is not None
    await connection.wait_closed()
    # With reconnect it comes again and again, and nobody there is no error.
    for _ in range(2):
        greeted.clear()
        address = replace(SocketAddress.tcp(*front.sockets[0].getsockname()), reconnect_s=0.01)
        assert await server.qmp.connect(address) is None
        await asyncio.wait_for(greeted.wait(), 60)
    front.close()
    await front.wait_closed()
    await server.qmp.close()


async def test_inherited_sockets(tmp_path: Path) -> None:
    server = Server()
    ours, theirs = socket.socketpair()
    await server.qmp.connect(SocketAddress.from_fd(ours.detach()))
    client = Client(theirs)
    assert "QMP" in await client.line()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "inherited"))
    listener.listen()
    await server.qmp.listen(SocketAddress.from_fd(listener.detach(), server=True))
    other = await Client.open(tmp_path / "inherited")
    await server.qmp.close()
    assert await client.line() is None
    assert await other.line() is None
    client.close()
    other.close()


async def test_nothing_as_stdio() -> None:
    server = Server()
    null = os.open("/dev/null", os.O_RDWR)
    connection = await server.qmp.serve_fds(null, null)
    await asyncio.wait_for(connection.wait_closed(), 60)
    os.close(null)


async def test_files_as_stdio_take_more_than_the_high_water_mark(tmp_path: Path) -> None:
    server = Server()
    echo = b'{"execute":"echo","arguments":{"text":"' + b"x" * 900_000 + b'"}}'
    (tmp_path / "in").write_bytes(b'{"execute":"qmp_capabilities"}' + echo * 4)
    with (tmp_path / "in").open("rb") as in_, (tmp_path / "out").open("wb") as out:
        connection = await server.qmp.serve_fds(in_.fileno(), out.fileno())
        await asyncio.wait_for(connection.wait_closed(), 60)
    assert (tmp_path / "out").stat().st_size > 4 * 900_000


@pytest.mark.parametrize("kind", ["pipe", "file"])
async def test_stdio(kind: str, tmp_path: Path) -> None:
    server = Server()
    commands = b'{"execute":"qmp_capabilities"}\n{"execute":"echo","arguments":{"text":"x"}}\n'
    out_read, out_write = os.pipe()
    if kind == "pipe":
        in_read, in_write = os.pipe()
        os.write(in_write, commands)
        os.close(in_write)
    else:
        (tmp_path / "in").write_bytes(commands)
        in_read = os.open(tmp_path / "in", os.O_RDONLY)
    connection = await server.qmp.serve_fds(in_read, out_write)
    await asyncio.wait_for(connection.wait_closed(), 60)
    assert os.get_blocking(out_write)
    os.close(in_read)
    os.close(out_write)
    with open(out_read, "rb") as out:
        assert [list(json.loads(line)) for line in out] == [["QMP"], ["return"], ["return"]]
    await server.qmp.close()


async def test_close_sends_what_is_owed(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    await client.send(json.dumps({"execute": "echo", "arguments": {"text": "x" * 600_000}}))
    connection = next(iter(server.qmp._connections))
    while connection._unsent_bytes() == 0:
        await asyncio.sleep(0)
    closing = asyncio.ensure_future(server.qmp.close())
    assert len((await client.line())["return"]) == 600_000
    assert await client.line() is None
    await closing
    client.close()


async def test_close_does_not_wait_for_ever(server: Server, tmp_path: Path) -> None:
    client = await Client.open(tmp_path / "qmp")
    server.hub.emit("TICK", {"n": 1})
    for number in range(10_000):
        server.hub.emit("TICK", {"n": number})
    await asyncio.wait_for(server.qmp.close(flush_s=0.01), 5)
    assert server.qmp.client_count == 0
    client.close()


async def test_errors_say_what_and_where(tmp_path: Path) -> None:
    server = Server()
    with pytest.raises(OSError, match=r"is too long: \d+ bytes, at most 107"):
        await server.qmp.listen(SocketAddress.unix(str(tmp_path / ("x" * 110)), server=True))
    with pytest.raises(OSError, match=r"Failed to bind 'unix:.*,server=on': No such file or directory"):
        await server.qmp.listen(SocketAddress.unix(str(tmp_path / "no" / "dir"), server=True))
    with pytest.raises(OSError, match=r"Failed to connect to 'unix:.*': No such file or directory"):
        await server.qmp.connect(SocketAddress.unix(str(tmp_path / "nobody")))
    await server.qmp.close()


async def test_commands_wait_until_they_are_released(tmp_path: Path) -> None:
    server = Server()
    held = QmpServer(server.dispatcher, server.hub, held=True)
    await held.listen(SocketAddress.unix(str(tmp_path / "qmp"), server=True))
    opening = asyncio.ensure_future(Client.open(tmp_path / "qmp"))
    await asyncio.wait_for(held.wait_clients(), 60)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not opening.done()
    held.release()
    (await opening).close()
    await held.close()


async def test_wait_for_a_client_of_each_monitor(server: Server, tmp_path: Path) -> None:
    await server.qmp.listen(SocketAddress.unix(str(tmp_path / "other"), server=True))
    await server.qmp.listen(SocketAddress.unix(str(tmp_path / "third"), server=True, wait=False))
    waiting = asyncio.ensure_future(server.qmp.wait_clients())
    await asyncio.sleep(0)
    client = await Client.open(tmp_path / "qmp")
    assert not waiting.done()
    other = await Client.open(tmp_path / "other")
    await asyncio.wait_for(waiting, 60)
    client.close()
    other.close()


async def test_a_slow_name_server_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> Any:
        asked.set()
        assert answer.wait(10)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    server = Server().qmp
    connecting = asyncio.ensure_future(server.connect(SocketAddress.tcp("vm.example", 1)))
    while not asked.is_set():
        await asyncio.sleep(0.001)  # the loop runs on
    answer.set()
    with pytest.raises(OSError, match="not known"):
        await connecting


async def test_what_is_no_host_name() -> None:
    with pytest.raises(OSError, match="is not a host name"):
        await Server().qmp.connect(SocketAddress.tcp("a" * 70 + ".example", 1))


class NoTime(Turns):
    """Everybody has the time for one command, and then waits for ever."""

    def __init__(self) -> None:
        super().__init__(asyncio.get_running_loop())
        self.queue: list[Any] = []

    @property
    def first_turn_s(self) -> float:
        return -1.0

    def later(self, turn: Any) -> None:
        self.queue.append(turn)


@pytest.mark.parametrize(("commands", "is_queued"), [(1, False), (2, True)])
async def test_only_who_has_more_to_be_executed_waits_for_a_turn(commands: int, is_queued: bool) -> None:
    ours, theirs = socket.socketpair()
    server, turns = Server(), NoTime()
    connection = Connection(SocketWire(theirs), server.dispatcher, server.hub, turns=turns)
    loop = asyncio.get_running_loop()
    with ours:
        ours.setblocking(False)
        assert b"QMP" in await loop.sock_recv(ours, 65536)
        ours.send(b'{"execute":"qmp_capabilities"}\r\n' * commands)
        assert b"return" in await loop.sock_recv(ours, 65536)
        assert bool(turns.queue) == is_queued
        await connection.close(0)
