"""pageferry-faultproxy: its rules, what each does to a real connection, its control socket, its command."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from tools.faultproxy import FaultProxy, main
from tools.faultproxy_rules import Action, Direction, Plan, RuleError, Verb, parse_rule, parse_script

DATA = random.Random(1).randbytes(100_000)
ROOT = pathlib.Path(__file__).resolve().parents[2]

# ---- rules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first to-server 1000 cut", (1, 1, 1000, None, Action(Verb.CUT))),
        ("every both 0 throttle 64K", (0, 2, 0, None, Action(Verb.THROTTLE, 65536))),
        ("7 to-client 1M..2M reset", (7, 1, 1 << 20, 2 << 20, Action(Verb.RESET))),
        ("second both now stall", (2, 2, None, None, Action(Verb.STALL))),
        ("third to-client 5 stall 0.5", (3, 1, 5, None, Action(Verb.STALL, 0.5))),
        ("every to-server 3 corrupt 0x80", (0, 1, 3, None, Action(Verb.CORRUPT, 128))),
        ("every to-server 3 corrupt", (0, 1, 3, None, Action(Verb.CORRUPT, 1))),
        ("every to-server 3 duplicate 10", (0, 1, 3, None, Action(Verb.DUPLICATE, 10))),
    ],
)
def test_a_rule_is_read(text: str, expected: tuple[object, ...]) -> None:
    rule = parse_rule(text)
    assert (rule.connection, len(rule.directions), rule.low, rule.high, rule.action) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cut", "expected CONNECTION DIRECTION OFFSET ACTION"),
        ("zeroth both 0 cut", "expected every, first"),
        ("0 both 0 cut", "expected every, first"),
        ("1 left 0 cut", "expected to-server, to-client or both"),
        ("1 both -1 cut", "expected a number of bytes"),
        ("1 both 9..1 cut", "expected LOW..HIGH"),
        ("1 both 0 explode", "expected one of cut, reset"),
        ("1 both 0 cut 5", "cut takes no argument"),
        ("1 both 0 throttle", "throttle needs a number of bytes"),
        ("1 both 0 stall -1", "expected seconds"),
        ("1 both 0 stall nan", "expected seconds"),
        ("1 both 0 corrupt 0x100", "expected a mask"),
        ("1 both now corrupt", "corrupt needs an offset"),
        ("1 both 0 duplicate 0", "at least one byte"),
    ],
)
def test_what_is_no_rule_is_refused_with_what_was_expected(text: str, complaint: str) -> None:
    with pytest.raises(RuleError, match=complaint):
        parse_rule(text)


def test_a_script_names_the_line_that_is_wrong() -> None:
    with pytest.raises(RuleError, match="line 3: expected one of"):
        parse_script("# a comment\nevery both 0 cut # and another\nevery both 0 kill")


def played(script: str, pieces: list[bytes], seed: int = 0, connection: int = 1) -> list[bytes | str]:
    """What a plan makes of the pieces, bytes between two actions in one piece."""
    plan = Plan(parse_script(script), connection, Direction.TO_SERVER, seed)
    found: list[bytes | str] = []
    for piece in [b"", *pieces]:
        for step in plan.feed(piece):
            if isinstance(step, Action):
                found.append(str(step))
            elif found and isinstance(found[-1], bytes):
                found[-1] += step
            else:
                found.append(step)
    return found


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("", [b"0123456789"]),
        ("every both 0 cut", ["cut", b"0123456789"]),
        ("every both 10 cut", [b"0123456789", "cut"]),
        ("every both 11 cut", [b"0123456789"]),
        ("every both 3 stall 1\nevery both 2 throttle 5", [b"01", "throttle 5", b"2", "stall 1", b"3456789"]),
        ("every both 3 corrupt 0x01", [b"0122456789"]),
        ("every both 9 corrupt 0x01", [b"0123456788"]),
        ("every both 2 duplicate 3", [b"0123423456789"]),
        ("every both 2 duplicate 3\nevery both 4 reset", [b"0123", "reset", b"423456789"]),
        ("every both 2 duplicate 3\nevery both 3 corrupt 0x01", [b"0122422456789"]),
        ("every both 8 duplicate 3", [b"0123456789"]),
        ("every to-client 3 cut\nsecond both 3 cut", [b"0123456789"]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 10])
def test_what_becomes_of_a_stream(script: str, expected: list[bytes | str], size: int) -> None:
    data = b"0123456789"
    assert played(script, [data[at : at + size] for at in range(0, 10, size)]) == expected


@given(cuts=st.lists(st.integers(0, 200), max_size=8), seed=st.integers(0, 9))
def test_the_same_seed_breaks_at_the_same_bytes_however_the_stream_comes(cuts: list[int], seed: int) -> None:
    script = (
        "every both 0..200 stall 0\nevery both 0..200 corrupt 7\nevery both 20..150 duplicate 9\n"
        "every both 0..200 cut"
    )
    data, edges = DATA[:200], [0, *sorted(cuts), 200]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert played(script, pieces, seed) == played(script, [data], seed)


def test_connections_and_seeds_choose_differently() -> None:
    script = "every both 0..100000 cut"
    choices = {str(played(script, [DATA], seed, n)) for seed in range(5) for n in range(5)}
    assert len(choices) == 25


# ---- real connections


class Echo:
    """A server that sends everything back and remembers how each connection ended."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        self.ends: list[str] = []
        self.uri = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = bytearray()
        self.received.append(mine)
        try:
            while data := await reader.read(4096):
                mine += data
                writer.write(data)
                await writer.drain()
            self.ends.append("eof")
        except ConnectionError as error:
            self.ends.append(type(error).__name__)
        writer.close()


@pytest_asyncio.fixture(params=["tcp", "unix"])
async def echo(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> AsyncIterator[Echo]:
    echo = Echo()
    if request.param == "tcp":
        server: asyncio.Server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
        echo.uri = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(echo.serve, tmp_path / "echo")
        echo.uri = f"unix:{tmp_path}/echo"
    async with server:
        yield echo


def address_for(echo: Echo, folder: pathlib.Path) -> str:
    return "tcp:127.0.0.1:0" if echo.uri.startswith("tcp") else f"unix:{folder}/proxy"


@contextlib.asynccontextmanager
async def proxied(
    echo: Echo, folder: pathlib.Path, script: str
) -> AsyncIterator[tuple[FaultProxy, list[str]]]:
    said: list[str] = []
    async with FaultProxy(address_for(echo, folder), echo.uri, script, 0, said.append) as proxy:
        yield proxy, said


async def open_to(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    scheme, _, rest = proxy.uri.partition(":")
    if scheme == "unix":
        return await asyncio.open_unix_connection(rest)
    return await asyncio.open_connection("127.0.0.1", int(rest.rpartition(":")[2]))


async def exchange(proxy: FaultProxy, data: bytes) -> tuple[bytes, str]:
    """Send it, end, and read what comes back; the second is how that ended."""
    reader, writer = await open_to(proxy)
    received = bytearray()

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            writer.write_eof()

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(60):
            while part := await reader.read(4096):
                received += part
        end = "eof"
    except ConnectionError as error:
        end = type(error).__name__
    sending.cancel()
    writer.close()
    return bytes(received), end


@pytest.mark.asyncio
async def test_without_rules_all_passes(echo: Echo, tmp_path: pathlib.Path) -> None:
    async with proxied(echo, tmp_path, "") as (proxy, _said):
        assert await exchange(proxy, DATA) == (DATA, "eof")


@pytest.mark.asyncio
async def test_a_cut_passes_exactly_what_came_before(echo: Echo, tmp_path: pathlib.Path) -> None:
    async with proxied(echo, tmp_path, "first to-server 12345 cut") as (proxy, said):
        _, _ = await exchange(proxy, DATA)
        assert await exchange(proxy, DATA) == (DATA, "eof"), "the second connection has no rule"
        assert bytes(echo.received[0]) == DATA[:12345]
        assert "connection 1: to-server 12345: cut" in said


@pytest.mark.asyncio
async def test_a_cut_of_what_comes_back(echo: Echo, tmp_path: pathlib.Path) -> None:
    async with proxied(echo, tmp_path, "every to-client 777 cut") as (proxy, _said):
        received, _ = await exchange(proxy, DATA[:5000])
        assert received == DATA[:777]


@pytest.mark.asyncio
async def test_a_reset_is_one(tmp_path: pathlib.Path) -> None:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.uri = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, proxied(echo, tmp_path, "every to-server 4096 reset") as (proxy, _said):
        reader, writer = await open_to(proxy)
        writer.write(DATA[:4096])
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(4097)
        writer.close()
        while not echo.ends:
            await asyncio.sleep(0.001)
        assert echo.ends == ["ConnectionResetError"]


@pytest.mark.asyncio
async def test_a_half_close_leaves_the_other_half(echo: Echo, tmp_path: pathlib.Path) -> None:
    async with proxied(echo, tmp_path, "every to-server 5000 half-close") as (proxy, _said):
        assert await exchange(proxy, DATA) == (DATA[:5000], "eof")
        assert echo.ends == ["eof"]


@pytest.mark.asyncio
async def test_a_flipped_bit_and_a_piece_twice(echo: Echo, tmp_path: pathlib.Path) -> None:
    script = "every to-server 100 corrupt 0x10\nevery to-client 200 duplicate 50"
    async with proxied(echo, tmp_path, script) as (proxy, _said):
        received, end = await exchange(proxy, DATA[:1000])
        changed = DATA[:100] + bytes([DATA[100] ^ 0x10]) + DATA[101:1000]
        assert bytes(echo.received[0]) == changed
        assert (received, end) == (changed[:250] + changed[200:], "eof")


@pytest.mark.asyncio
async def test_a_stall_ends_by_itself_or_by_command(echo: Echo, tmp_path: pathlib.Path) -> None:
    script = "first to-server 10 stall 0.1\nsecond to-server 10 stall"
    async with proxied(echo, tmp_path, script) as (proxy, _said):
        begin = time.monotonic()
        assert await exchange(proxy, DATA) == (DATA, "eof")
        assert time.monotonic() - begin >= 0.1
        stalled = asyncio.create_task(exchange(proxy, DATA))
        while not any(each["stalled"] for each in proxy.command("status")["ok"]):
            await asyncio.sleep(0.001)
        assert proxy.command("status")["ok"][1]["to-server"] == 10
        assert proxy.command("resume") == {"ok": True}
        assert await stalled == (DATA, "eof")


@pytest.mark.asyncio
async def test_a_throttle_takes_its_time(echo: Echo, tmp_path: pathlib.Path) -> None:
    async with proxied(echo, tmp_path, "every to-server 50000 throttle 100000") as (proxy, _said):
        begin = time.monotonic()
        assert await exchange(proxy, DATA[:70_000]) == (DATA[:70_000], "eof")
        assert 0.15 <= time.monotonic() - begin <= 20.0, "20,000 bytes at 100,000 a second"


@pytest.mark.asyncio
async def test_what_is_told_while_it_runs(echo: Echo, tmp_path: pathlib.Path) -> None:
    async with proxied(echo, tmp_path, "") as (proxy, said):
        reader, writer = await open_to(proxy)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert proxy.command("status") == {
            "ok": [{"connection": 1, "open": True, "to-server": 5, "to-client": 5, "stalled": []}]
        }
        assert "is past" in proxy.command("rule first to-server 3 cut")["error"]
        assert proxy.command("rule every to-server 3 cut") == {"ok": True}, "for those that come"
        assert proxy.command("clear") == {"ok": True}
        assert proxy.command("rule first both now cut") == {"ok": True}
        assert await reader.read() == b""
        writer.close()
        assert "connection 1: to-server 5: cut" in said
        assert proxy.command("refuse") == {"ok": True}
        assert (await exchange(proxy, b"x"))[0] == b""
        proxy.command("accept")
        assert await exchange(proxy, b"x") == (b"x", "eof")
        assert "no command 'explode'" in proxy.command("explode")["error"]


@pytest.mark.asyncio
async def test_a_client_is_turned_away_when_there_is_no_server(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    async with FaultProxy(f"unix:{tmp_path}/p", f"unix:{tmp_path}/none", say=said.append) as proxy:
        assert (await exchange(proxy, b"x"))[0] == b""
        assert "no server" in said[0]


# ---- the command


@pytest.fixture
def command(tmp_path: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """The proxy as users start it, with a script, between two sockets of the test's folder."""
    (tmp_path / "script").write_text("first to-server 3 stall # until told\n")
    options = ["--script", "script", "--rule", "first to-server 4 cut", "--control", "unix:control"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.faultproxy", "unix:wire", "unix:target", *options],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        yield process
        process.kill()


@pytest.mark.asyncio
async def test_the_command(tmp_path: pathlib.Path, command: subprocess.Popen[str]) -> None:
    echo = Echo()
    async with await asyncio.start_unix_server(echo.serve, tmp_path / "target"):
        assert command.stdout is not None
        line = await asyncio.to_thread(command.stdout.readline)
        assert line == "listening on unix:wire\n"
        while not (tmp_path / "control").exists():
            await asyncio.sleep(0.005)
        assert (tmp_path / "control").stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(tmp_path / "wire")
        control = await asyncio.open_unix_connection(tmp_path / "control")
        writer.write(b"123456")
        assert await reader.readexactly(3) == b"123"

        async def tell(text: str) -> dict[str, object]:
            control[1].write(text.encode() + b"\n")
            answer = json.loads(await control[0].readline())
            assert isinstance(answer, dict)
            return answer

        assert (await tell("status"))["ok"] != []
        assert await tell("resume") == {"ok": True}
        while len(echo.received[0]) < 4:
            await asyncio.sleep(0.001)
        assert await reader.read() in (b"", b"4")
        assert await tell("quit") == {"ok": True}
        assert await asyncio.to_thread(command.wait, 10) == 0
        writer.close()
        control[1].close()
        assert command.stderr is not None
        assert "connection 1: to-server 4: cut" in command.stderr.read()
        assert not (tmp_path / "control").exists()
        assert not (tmp_path / "wire").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tcp:nowhere", "unix:/b"], "error parsing address 'nowhere'"),
        (["unix:/a", "fd:3"], "expected tcp:HOST:PORT or unix:PATH"),
        (["unix:/a", "unix:/b", "--rule", "both cut"], "line 1: expected CONNECTION"),
        (["unix:/nonexistent/a", "unix:/b"], "No such file"),
    ],
)
def test_what_cannot_be_used(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err
