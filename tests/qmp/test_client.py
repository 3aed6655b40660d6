"""The client against servers that behave, refuse, chatter and hang up."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from qmp.address import SocketAddress
from qmp.client import CommandFailed, Disconnected, QmpClient
from qmp.dispatcher import Call, Dispatcher
from qmp.events import EventHub
from qmp.schema import Schema
from qmp.server import QmpServer

pytestmark = pytest.mark.asyncio

DOCUMENT = {
    "commands": {
        "qmp_capabilities": {
            "arguments": {
                "type": "object",
                "properties": {"enable": {"type": "array", "items": {"type": "string"}}},
            }
        },
        "echo": {
            "arguments": {"type": "object", "properties": {"text": {"type": "string"}}},
            "returns": {"type": "string"},
        },
        "wait": {},
        "go": {"oob": True},
        "fd-size": {"returns": {"type": "integer"}},
    },
    "events": {"TICK": {"data": {"type": "object", "properties": {"n": {"type": "integer"}}}}, "TOCK": {}},
}


class Server:
    """A real server with a few commands."""

    def __init__(self) -> None:
        schema = Schema({"test.json": json.dumps(DOCUMENT).encode()})
        self.hub = EventHub(schema)
        self.gate = asyncio.Event()
        dispatcher = Dispatcher(schema, {"qemu": {"major": 7}})
        for name, handler in {
            "qmp_capabilities": lambda call: call.client.session.negotiate(call.arguments.get("enable", [])),
            "echo": lambda call: call.arguments["text"],
            "wait": self.wait,
            "go": lambda call: self.gate.set(),
            "fd-size": self.fd_size,
        }.items():
            dispatcher.register(name, handler)
        self.qmp = QmpServer(dispatcher, self.hub)

    async def wait(self, call: Call) -> None:
        await self.gate.wait()

    def fd_size(self, call: Call) -> int:
        fd = call.client.fds.take_received()
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server()
    await server.qmp.listen(SocketAddress.unix(str(tmp_path / "qmp"), server=True))
    yield server
    await server.qmp.close()


async def test_many_commands_at_once(server: Server, tmp_path: Path) -> None:
    async with await QmpClient.connect(str(tmp_path / "qmp")) as client:
        assert client.greeting["version"] == {"qemu": {"major": 7}}
        texts = [str(number) * number for number in range(200)]
        replies = await asyncio.gather(*(client.execute("echo", {"text": text}) for text in texts))
        assert replies == texts
        waiting = asyncio.ensure_future(client.execute("wait"))
        await client.execute("go", oob=True)
        assert await waiting == {}
        assert len(await client.execute("echo", {"text": "ü" * 1_000_000})) == 1_000_000


async def test_tcp(server: Server) -> None:
    listener = await server.qmp.listen(SocketAddress.tcp("", 0, server=True))
    async with await QmpClient.connect(listener.getsockname(), oob=False) as client:
        with pytest.raises(CommandFailed, match="exec-oob"):
            await client.execute("go", oob=True)


async def test_refusals(server: Server, tmp_path: Path) -> None:
    async with await QmpClient.connect(str(tmp_path / "qmp")) as client:
        with pytest.raises(CommandFailed, match="has not been found") as caught:
            await client.execute("nonsense")
        assert (caught.value.command, caught.value.error_class) == ("nonsense", "CommandNotFound")
        assert await client.execute("echo", {"text": "on"}) == "on"
    with pytest.raises(Disconnected, match="closed"):
        await client.execute("echo", {"text": "off"})
    assert client.events() is not None
    assert [event async for event in client.events()] == []


async def test_descriptors(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 77)
    async with await QmpClient.connect(str(tmp_path / "qmp")) as client:
        with open(tmp_path / "file") as file:
            assert await client.execute("fd-size", fds=[file.fileno()]) == 77
        with pytest.raises(CommandFailed, match="No file descriptor supplied"):
            await client.execute("fd-size")


async def test_events(server: Server, tmp_path: Path) -> None:
    async with await QmpClient.connect(str(tmp_path / "qmp")) as client:
        one, other, closed = client.events(), client.events(), client.events()
        closed.close()
        for number in range(3):
            server.hub.emit("TICK", {"n": number})
        server.hub.emit("TOCK")
        assert (await one.next("TOCK"))["event"] == "TOCK"
        assert [(await other.next())["data"]["n"] for _ in range(3)] == [0, 1, 2]
        await server.qmp.close()
        assert [event["event"] async for event in other] == ["TOCK"]
        with pytest.raises(Disconnected, match="before TICK"):
            await one.next("TICK")
        await client.wait_closed()


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n{"return": {}, "id": 1}\r\n'


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "No QMP greeting"),
        (b'{"hello": 1}\n', "No QMP greeting"),
        (b'{"QMP": 1}\n', "No QMP greeting"),
        (b"", "hung up"),
        (b'{"QMP"', "hung up"),
    ],
)
async def test_strangers(tmp_path: Path, answer: bytes, text: str) -> None:
    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(on_client, tmp_path / "s"):
        with pytest.raises(Disconnected, match=text):
            await QmpClient.connect(str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "hung up"),
        (b"rubbish\n", "not QMP"),
        (b"[]\n", "not QMP"),
        (b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n', "JSON parse error"),
        (b'{"return": {}, "id": 77}\n', "hung up"),
    ],
)
async def test_what_ends_a_wait(answer: bytes, text: str) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(GREETING)
    client = QmpClient(ours)
    await client.negotiate()
    waiting = asyncio.ensure_future(client.execute("wait"))
    await asyncio.sleep(0)
    theirs.sendall(answer)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(Disconnected, match=text):
        await asyncio.wait_for(waiting, 60)
    theirs.close()
    with pytest.raises(Disconnected):
        await client.execute("again")
    await client.close()


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await QmpClient.connect(str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="too long"):
        await QmpClient.connect(str(tmp_path / ("x" * 120)))
