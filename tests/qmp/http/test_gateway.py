"""The gateway over real sockets: what it serves, what it refuses, and that QMP is QMP."""

from __future__ import annotations

import asyncio
import json
import pathlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import WSMsgType

import schema
from qmp.address import SocketAddress
from qmp.dispatcher import Call, Dispatcher
from qmp.errors import GenericError
from qmp.events import EventHub
from qmp.http import gateway as gateway_module
from qmp.http.feed import Feed
from qmp.http.gateway import HEADERS, Gateway, Page
from qmp.schema import Schema
from qmp.sockets import open_listener
from tests.support.http_attacks import WEBSOCKET, attacks, converse, request, status_of

pytestmark = pytest.mark.asyncio

TOKEN = "a-token-of-some-length"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class House:
    """A gateway on loopback before a QMP server with three commands."""

    def __init__(self) -> None:
        self.schema = Schema(schema.documents())
        self.hub = EventHub(self.schema)
        self.dispatcher = Dispatcher(
            self.schema, {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "p"}
        )
        self.go_on = asyncio.Event()
        self.dispatcher.register("qmp_capabilities", self._negotiate)
        self.dispatcher.register("query-name", lambda call: {"name": "x"})
        self.dispatcher.register("query-status", self._slow)
        self.dispatcher.register("migrate-pause", lambda call: None)
        self.dispatcher.register("query-uuid", self._broken)
        self.feed = Feed()
        self.gateway: Gateway
        self.port = 0

    @staticmethod
    def _negotiate(call: Call) -> None:
        call.client.session.negotiate(call.arguments.get("enable", []))

    async def _slow(self, call: Call) -> Any:
        await self.go_on.wait()
        return {"status": "running", "running": True, "singlestep": False}

    @staticmethod
    def _broken(call: Call) -> None:
        raise GenericError("no")

    async def open(self, *, held: bool = False) -> None:
        pages = {"/": Page("text/plain; charset=utf-8", lambda: "hello"), "/bug": Page("text/plain", _bug)}
        self.gateway = Gateway(
            self.dispatcher,
            self.hub,
            token=TOKEN,
            pages=pages,
            feeds={"/status/stream": self.feed},
            allowed_hosts=frozenset({"vm.example"}),
            held=held,
        )
        listener = await open_listener(SocketAddress.tcp("127.0.0.1", 0, server=True))
        self.port = listener.getsockname()[1]
        await self.gateway.serve(listener)

    @property
    def own(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.own}"

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, data: bytes) -> bytes:
        return await converse(await self.connect(), data)


def _bug() -> str:
    raise RuntimeError("a bug")


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    await house.open()
    yield house
    house.go_on.set()
    await house.gateway.close(0.2)


@pytest_asyncio.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


class Talk:
    """One QMP client over the WebSocket."""

    def __init__(self, wire: aiohttp.ClientWebSocketResponse) -> None:
        self.wire = wire

    async def read(self) -> Any:
        frame = await self.wire.receive(timeout=60)
        assert frame.type is WSMsgType.TEXT, frame
        assert frame.data.isascii()
        return json.loads(frame.data)

    async def say(self, text: str) -> Any:
        await self.wire.send_str(text)
        return await self.read()

    async def closed(self) -> int:
        """The code of the server's close frame."""
        while (frame := await self.wire.receive(timeout=60)).type is WSMsgType.TEXT:
            pass
        assert frame.type is WSMsgType.CLOSE, frame
        return int(frame.data)


async def talk(
    house: House, client: aiohttp.ClientSession, *, negotiated: bool = True, oob: bool = False
) -> Talk:
    wire = await client.ws_connect(f"{house.url}/qmp", headers=AUTHORIZED, max_msg_size=1 << 26)
    found = Talk(wire)
    if negotiated:
        assert "QMP" in await found.read()
        enable = {"enable": ["oob"] if oob else []}
        answer = await found.say(json.dumps({"execute": "qmp_capabilities", "arguments": enable}))
        assert answer == {"return": {}}
    return found


def query_name(id_: Any) -> str:
    return json.dumps({"execute": "query-name", "id": id_})


# ---- what is refused ----


ATTACK_NAMES = list(attacks("h:1", TOKEN))


async def test_there_are_enough_attacks() -> None:
    assert len(ATTACK_NAMES) >= 30


async def test_attacks_are_refused(house: House, caplog: pytest.LogCaptureFixture) -> None:
    answers = {name: await house.say(data) for name, data in attacks(house.own, TOKEN).items()}
    served = {name: answer[:200] for name, answer in answers.items() if not 400 <= status_of(answer) < 500}
    assert not {name: answer for name, answer in served.items() if answer}, "answered, and not refused"
    assert not house.gateway.client_count
    assert house.dispatcher.executed_count == 0
    for name, answer in answers.items():
        if answer and status_of(answer):
            assert answer.count(b"Server: pageferry") == 1, f"{name}: one refusal, then the end: {answer!r}"
            assert b"default-src 'self'" in answer, name
    assert not [record for record in caplog.records if record.exc_info], "no traceback for a bad request"


async def test_after_a_refusal_nothing_more_is_read(house: House) -> None:
    second = request("GET /", house.own)
    assert (await house.say(request("GET /x", house.own) + second)).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("evil host", 421),
        ("null origin", 403),
        ("another site's script", 403),
        ("socket without token", 401),
        ("parent folder", 404),
        ("DELETE", 405),
        ("GET with a body", 415),
        ("GET with a huge body", 413),
        ("socket without upgrade", 426),
        ("upgrade elsewhere", 400),
        ("WebSocket with a short key", 400),
    ],
)
async def test_each_refusal_has_its_status(house: House, name: str, status: int) -> None:
    assert status_of(await house.say(attacks(house.own, TOKEN)[name])) == status


# ---- what is served ----


async def test_pages(house: House, client: aiohttp.ClientSession) -> None:
    for path, kind in {
        "/": "text/plain",
        "/?x=1": "text/plain",
        "/schema": "application/json",
        "/schema/query-qmp-schema": "application/json",
        "/schema/migration.json": "application/schema+json",
        "/docs": "text/html",
        "/docs.css": "text/css",
    }.items():
        async with client.get(house.url + path) as response:
            assert response.status == 200, path
            assert response.content_type == kind
            assert {name: response.headers[name] for name in HEADERS} == HEADERS
            assert "Set-Cookie" not in response.headers
            assert "Access-Control-Allow-Origin" not in response.headers
            assert await response.read()
        async with client.head(house.url + path) as response:
            assert response.status == 200
            assert await response.read() == b""


@pytest.mark.parametrize(
    "host", ["localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LOCALHOST:{}", "vm.example", "vm.example:8"]
)
async def test_our_names(house: House, host: str) -> None:
    head = request("GET /", host.format(house.port), "Connection: close")
    assert status_of(await house.say(head)) == 200


async def test_the_schema_is_that_of_qmp(house: House, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{house.url}/schema/query-qmp-schema") as response:
        entities = await response.json()
    assert {entity["name"] for entity in entities if entity["meta-type"] == "command"} == set(
        house.dispatcher.names
    )
    async with client.get(f"{house.url}/schema") as response:
        index = await response.json()
    for path in index["documents"]:
        async with client.get(house.url + path) as response:
            document = json.loads(await response.read())
        assert document == house.schema.documents[path.rpartition("/")[2]]


async def test_a_bug_is_answered_and_told(
    house: House, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with client.get(f"{house.url}/bug") as response:
        assert response.status == 500
        assert "a bug" not in await response.text()
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert [record for record in caplog.records if record.exc_info]


async def test_on_a_unix_socket(tmp_path: pathlib.Path) -> None:
    house = House()
    await house.open()
    path = str(tmp_path / "s")
    await house.gateway.serve(await open_listener(SocketAddress.unix(path, server=True)))
    try:
        for host, status in {"localhost": 200, "evil.example": 421, f"localhost:{house.port}": 421}.items():
            streams = await asyncio.open_unix_connection(path)
            assert status_of(await converse(streams, request("GET /", host, "Connection: close"))) == status
    finally:
        await house.gateway.close(0.1)


# ---- QMP ----


async def test_qmp(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client, negotiated=False)
    greeting = await found.read()
    assert greeting == {"QMP": house.dispatcher.greeting}
    refused = await found.say('{"execute":"query-name","id":1}')
    assert refused["error"]["class"] == "CommandNotFound"
    assert await found.say('{"execute":"qmp_capabilities","id":{"a":[null]}}') == {
        "return": {},
        "id": {"a": [None]},
    }
    assert await found.say("{'execute':'query-name'}") == {"return": {"name": "x"}}
    assert (await found.say('{"execute":"query-uuid"}'))["error"]["desc"] == "no"
    house.hub.emit("STOP")
    assert (await found.read())["event"] == "STOP"
    assert house.gateway.client_count == 1
    await found.wire.close()


async def test_a_message_ends_with_its_frame(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    for bad in ('{"execute":', '{"execute":"query-name', "[[", "'", "nonsense", "12", '"x"', "{'a':1}"):
        answer = await found.say(bad)
        assert answer["error"]["class"] == "GenericError", bad
        assert await found.say('{"execute":"query-name","id":1}') == {"return": {"name": "x"}, "id": 1}, bad
    await found.wire.send_str('{"execute":"query-name","id":1} {"execute":"query-name","id":2}')
    assert [(await found.read())["id"], (await found.read())["id"]] == [1, 2]


async def test_empty_frames_say_nothing(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    await found.wire.send_str("")
    await found.wire.send_str(" \r\n")
    assert await found.say('{"execute":"query-name"}') == {"return": {"name": "x"}}


async def test_out_of_band(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client, oob=True)
    await found.wire.send_str('{"execute":"query-status","id":1}')
    assert await found.say('{"exec-oob":"migrate-pause","id":2}') == {"return": {}, "id": 2}
    house.go_on.set()
    assert (await found.read())["id"] == 1


async def test_without_oob_one_after_the_other(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    await found.wire.send_str('{"execute":"query-status","id":1}')
    for number in range(20):
        await found.wire.send_str(query_name(number + 2))
    house.go_on.set()
    assert [(await found.read())["id"] for _ in range(21)] == list(range(1, 22))


async def test_large_messages(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    filler = "x" * (15 << 20)
    answer = await found.say(query_name(filler))
    assert answer["id"] == filler


async def test_larger_ones_end_it_before_they_came(house: House) -> None:
    reader, writer = await house.connect()
    writer.write(request("GET /qmp", house.own, *WEBSOCKET, *_authorized()))
    await reader.readuntil(b"}}")
    writer.write(bytes([0x81, 0xFF]) + (16 << 20 | 1).to_bytes(8, "big") + b"\0\0\0\0")
    assert (1009).to_bytes(2, "big") in await reader.read()
    writer.close()


async def test_what_is_no_text_ends_it(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    await found.wire.send_bytes(b'{"execute":"query-name"}')
    assert await found.closed() == 1003


async def test_garbage_for_ever_ends_it(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    for _ in range(1001):
        await found.wire.send_str("nonsense")
    assert await found.closed() == 1008


async def test_held_until_released(client: aiohttp.ClientSession) -> None:
    house = House()
    await house.open(held=True)
    try:
        found = await talk(house, client, negotiated=False)
        assert "QMP" in await found.read()
        await found.wire.send_str('{"execute":"qmp_capabilities"}')
        async with client.get(house.url) as response:  # a round trip later it has been received
            assert response.status == 200
        assert house.dispatcher.executed_count == 0
        house.gateway.release()
        assert await found.read() == {"return": {}}
    finally:
        await house.gateway.close(0.1)


async def test_close_sends_what_is_owed(house: House, client: aiohttp.ClientSession) -> None:
    found = await talk(house, client)
    house.hub.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    await house.gateway.close(1.0)
    assert (await found.read())["event"] == "SHUTDOWN"
    assert await found.closed() == 1001


async def test_a_client_that_does_not_read(house: House) -> None:
    """Its commands wait, then its events end it; it costs others nothing."""
    reader, writer = await house.connect()
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer.write(request("GET /qmp", house.own, *WEBSOCKET, f"Authorization: Bearer {TOKEN}"))
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    writer.write(_frame(b'{"execute":"qmp_capabilities"}'))
    await reader.readuntil(b'{"return": {}}')
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # the stream's transport can
    names = 0
    while house.gateway.client_count:
        house.hub.emit("MIGRATION_PASS", {"pass": names})
        names += 1
        assert names < 200_000
        if names % 100 == 0:
            await asyncio.sleep(0)
    writer.transport.abort()


def _frame(payload: bytes) -> bytes:
    """A masked text frame, with a mask of zeroes."""
    assert len(payload) < 126
    return bytes([0x81, 0x80 | len(payload)]) + b"\0\0\0\0" + payload


# ---- feeds and bounds ----


async def test_watching(house: House, client: aiohttp.ClientSession) -> None:
    house.feed.publish(b"1")
    async with client.get(f"{house.url}/status/stream") as response:
        assert response.content_type == "text/event-stream"
        assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
        assert house.feed.watcher_count == 1
        house.feed.publish(b"2")
        assert await response.content.readuntil(b"\n\n") == b"data: 2\n\n"
    while house.feed.watcher_count:
        house.feed.publish(b"3")
        await asyncio.sleep(0)


async def test_a_watcher_that_does_not_read_costs_one_value(house: House) -> None:
    reader, writer = await house.connect()
    writer.write(request("GET /status/stream", house.own))
    house.feed.publish(b"x" * 1000)
    await reader.readuntil(b"\n\n")
    for _ in range(20_000):
        house.feed.publish(b"x" * 1000)
        if _ % 100 == 0:
            await asyncio.sleep(0)
    connection = house.gateway._protocols.connections[0]
    assert connection.transport is not None
    assert connection.transport.get_write_buffer_size() < 1 << 18
    writer.transport.abort()


@pytest.mark.parametrize("path", ["/status/stream", "/qmp"])
async def test_too_many(house: House, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAX_CLIENTS", 2)
    monkeypatch.setattr(gateway_module, "MAX_WATCHERS", 2)
    house.feed.publish(b"1")
    head = request(path and f"GET {path}", house.own, *(WEBSOCKET if path == "/qmp" else ()), *_authorized())
    streams = [await house.connect() for _ in range(2)]
    for reader, writer in streams:
        writer.write(head)
        await reader.readuntil(b"\r\n\r\n")
    assert status_of(await house.say(head)) == 429
    for _, writer in streams:
        writer.transport.abort()


def _authorized() -> list[str]:
    return [f"{name}: {value}" for name, value in AUTHORIZED.items()]


async def test_too_many_connections(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAX_CONNECTIONS", 3)
    idle = [await house.connect() for _ in range(3)]
    while len(house.gateway._protocols.connections) < 3:
        await asyncio.sleep(0)
    assert await house.say(request("GET /", house.own)) == b""
    for _, writer in idle:
        writer.transport.abort()


async def test_a_head_that_does_not_come_is_not_awaited_for_ever(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "_IDLE_S", 0.05)
    assert await house.say(b"") == b""
    assert await house.say(b"GET / HTTP/1.1\r\nHost: ") == b""


async def test_counts(house: House) -> None:
    await house.say(request("GET /", house.own, "Connection: close"))
    await house.say(request("GET /x", house.own))
    assert (house.gateway.request_count, house.gateway.refused_count) == (2, 1)
