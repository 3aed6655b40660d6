"""-http on a whole program: a browser watches a migration, QMP over WebSocket, attacks, what it costs QMP."""

from __future__ import annotations

import asyncio
import itertools
import pathlib
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.functional.harness import VM, Pair, Stable
from tests.support.browser import Browser
from tests.support.http_attacks import attacks, converse, request, status_of
from tests.support.moves import DIRTIER, HELD, MIB, limits, wait_passes
from tests.support.requires import requires
from tools.vm_process import POLL_S, ROOT

pytestmark = pytest.mark.asyncio

PICTURES = ROOT / "build" / "screenshots"
HTTP = ("-http", "127.0.0.1:0", "-d", "qmp")
QMP_P99_MS = 20.0
ANSWER_S = 60.0
"""How long anything may take that is certain to come: far more than it needs."""
ROUNDS = 5
ROUND_S = 1.0


def url_of(vm: VM) -> str:
    """Where it says that it serves HTTP."""
    found = re.search(r"HTTP is served at (\S+)", vm.messages())
    assert found, vm.messages()
    return found[1]


def token_of(vm: VM) -> str:
    """The token, from the file that it names."""
    return token_path(vm).read_text().strip()


def token_path(vm: VM) -> pathlib.Path:
    found = re.search(r"the token that /qmp asks for is in (\S+)", vm.messages())
    assert found, vm.messages()
    return pathlib.Path(found[1])


def loads_aiohttp(vm: VM) -> bool:
    """Whether its C parts are mapped."""
    return "/aiohttp/" in pathlib.Path(f"/proc/{vm.pid}/maps").read_text()


# ---- in a browser ----


async def watch_progress(browser: Browser, seen: list[float]) -> None:
    """Note what the bar shows, as it changes."""
    while True:
        value = await browser.evaluate("Number(document.getElementById('progress').value)")
        if not seen or value != seen[-1]:
            seen.append(value)
        await asyncio.sleep(0.02)


async def phases(browser: Browser) -> dict[str, str]:
    """Name -> state of the phases on the page."""
    shown = "[...document.querySelectorAll('#phases li')].map(item => [item.dataset.phase, item.className])"
    return dict(await browser.evaluate(shown))


async def cells(browser: Browser) -> list[float]:
    """What the cells of the page map show."""
    shown: list[float] = await browser.evaluate(
        "[...document.querySelectorAll('#map i')].map(cell => Number(cell.dataset.part))"
    )
    return shown


def text_is(name: str, text: str) -> str:
    return f"document.getElementById('{name}').textContent === '{text}'"


@pytest.mark.slow
async def test_a_browser_watches_a_migration(stable: Stable) -> None:
    requires("chromium")
    requires("uffd")
    # The destination's guest is started late: until then nothing is requested, and nothing is pushed.
    paused = ("-incoming", "defer", "-S")
    pair = await stable.pair(*DIRTIER(), *HTTP, "-name", "guest-1", incoming=paused)
    await pair.source.wait_output(lambda text: "AB" in text)
    async with Browser() as browser:
        await browser.open(url_of(pair.source))
        await browser.wait_for(text_is("run-state", "running"))
        assert await browser.evaluate("document.title") == "guest-1 · Pageferry"
        assert await browser.evaluate("document.getElementById('migration').hidden")
        seen: list[float] = []
        watcher = asyncio.create_task(watch_progress(browser, seen))
        await check_precopy(pair, browser)
        await check_postcopy(pair, browser)
        watcher.cancel()
        assert len(seen) > 3, "the bar moves while the page stays open"
        assert seen == sorted(seen), "progress never runs backwards"
        await check_destination(pair, browser)
        assert await browser.complaints() == [], "nothing was blocked, nothing failed"


async def check_precopy(pair: Pair, browser: Browser) -> None:
    """The page during a precopy that does not converge."""
    await limits(pair.source, max_bandwidth=20 * MIB, downtime_limit=0, max_postcopy_bandwidth=HELD)
    await pair.begin(postcopy_ram=True)
    await browser.wait_for(text_is("status", "active"))
    assert list((await phases(browser)).values()) == ["done", "now", "next", "next", "next"]
    await wait_passes(pair.source, 2)
    await browser.wait_for(
        "/Will not converge|Switchover in/.test(document.getElementById('outlook').textContent)"
    )
    await browser.wait_for("document.querySelectorAll('#rates path').length === 2")
    shown = await cells(browser)
    assert len(shown) > 32
    assert any(part < 1 for part in shown)
    assert any(part == 1 for part in shown)
    assert "MIGRATION_PASS" in await browser.evaluate("document.getElementById('events').textContent")
    await browser.screenshot(PICTURES / "status-page-precopy.png")


async def check_postcopy(pair: Pair, browser: Browser) -> None:
    """The same page, still open, through postcopy to the end."""
    await pair.source.qmp("migrate-start-postcopy")
    await browser.wait_for(text_is("status", "postcopy-active"))
    assert (await phases(browser))["postcopy-active"] == "now"
    await browser.wait_for(text_is("run-state", "finish-migrate"))
    await browser.screenshot(PICTURES / "status-page-postcopy.png")
    await pair.destination.wait_run_state("paused")
    await pair.destination.qmp("cont")
    while not (await pair.destination.qmp("query-migrate"))["x-fault-latency"]["count"]:
        await asyncio.sleep(POLL_S)
    await limits(pair.source, max_postcopy_bandwidth=0)
    await pair.finish()
    await browser.wait_for(text_is("status", "completed"))
    assert set((await phases(browser)).values()) == {"done"}
    assert set(await cells(browser)) == {1}
    assert await browser.evaluate("document.getElementById('percent').textContent") == "100.0 %"


async def check_destination(pair: Pair, browser: Browser) -> None:
    """The destination's page, opened when all is over."""
    await browser.open(url_of(pair.destination))
    await browser.wait_for(text_is("title", "Incoming migration"))
    await browser.wait_for("document.querySelectorAll('#histogram .bar').length > 0")
    assert "faults" in await browser.evaluate("document.getElementById('latency-summary').textContent")
    await browser.screenshot(PICTURES / "status-page-destination.png")


# ---- without a browser ----


async def test_qmp_over_a_websocket_to_the_end(stable: Stable) -> None:
    vm = await stable.start("web", *DIRTIER(), *HTTP)
    headers = {"Authorization": f"Bearer {token_of(vm)}"}
    path = token_path(vm)
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(f"{url_of(vm)}qmp", headers=headers) as wire,
    ):

        async def say(command: str) -> Any:
            await wire.send_json({"execute": command, "id": command})
            while (answer := await wire.receive_json(timeout=ANSWER_S)).get("id") != command:
                assert "event" in answer or "QMP" in answer
            return answer

        assert await say("qmp_capabilities") == {"return": {}, "id": "qmp_capabilities"}
        assert (await say("query-status"))["return"]["status"] == "running"
        metrics = await (await client.get(f"{url_of(vm)}metrics")).text()
        assert 'pageferry_qmp_clients{transport="websocket"} 1.0' in metrics
        assert 'pageferry_qmp_clients{transport="socket"} 1.0' in metrics
        assert await say("quit") == {"return": {}, "id": "quit"}
        assert (await wire.receive(timeout=ANSWER_S)).type is aiohttp.WSMsgType.CLOSE
    assert await vm.wait_exit() == 0
    assert not path.exists()


async def test_attacks_on_the_whole_program(stable: Stable) -> None:
    vm = await stable.start("web", *DIRTIER(), *HTTP)
    own = url_of(vm).removeprefix("http://").rstrip("/")
    host, _, port = own.rpartition(":")
    all_of_them = attacks(own, token_of(vm))
    assert len(all_of_them) >= 30
    for name, data in all_of_them.items():
        answer = await converse(await asyncio.open_connection(host, int(port)), data)
        assert not answer or 400 <= status_of(answer) < 500, (name, answer)
    assert (await vm.qmp("query-status"))["status"] == "running"
    good = await converse(
        await asyncio.open_connection(host, int(port)), request("GET /", own, "Connection: close")
    )
    assert status_of(good) == 200


async def test_aiohttp_is_loaded_only_for_http(stable: Stable) -> None:
    plain = await stable.start("plain", "-M", "none", "-m", "4M")
    assert not loads_aiohttp(plain)
    path = plain.folder / "http"
    web = await stable.start("web", "-M", "none", "-m", "4M", "-http", f"unix:{path}")
    assert loads_aiohttp(web)
    streams = await asyncio.open_unix_connection(str(path))
    assert status_of(await converse(streams, request("GET /status", "localhost", "Connection: close"))) == 200
    await web.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-http", "0.0.0.0:0"], "Others can reach the address 0.0.0.0"),
        (["-http", "127.0.0.1:0,token=/nowhere"], "Cannot read the token in '/nowhere': No such file"),
        (["-http", "unix:/nowhere/socket"], "No such file or directory"),
    ],
)
async def test_what_cannot_be(options: list[str], message: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmm", "-M", "none", "-m", "4M", *options),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    async with asyncio.timeout(ANSWER_S):
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert message in errors.decode()
    assert "Traceback" not in errors.decode()


# ---- what it costs QMP ----


@asynccontextmanager
async def busy_process(folder: pathlib.Path) -> AsyncIterator[list[int]]:
    """Two guests that are sent over and over by one process; how often each was, when it has ended."""
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *(sys.executable, "-m", "tests.support.busy_process", str(folder)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    counts: list[int] = []
    try:
        async with asyncio.timeout(ANSWER_S):
            assert await process.stdout.readline() == b"busy\n"
        yield counts
        async with asyncio.timeout(ANSWER_S):
            process.stdin.close()
            counts += map(int, (await process.stdout.readline()).split())
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def poll(folder: pathlib.Path) -> None:
    """As a browser that reloads the page all the time and a scraper: at most 50 requests a second."""
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(folder / "http"))) as client:
        for path in itertools.cycle(("", "page.js", "status", "metrics")):
            async with client.get(f"http://localhost/{path}") as response:
                assert response.status == 200
                await response.read()
            await asyncio.sleep(0.02)


async def watch(folder: pathlib.Path) -> None:
    """As a page that is open."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(folder / "http"))) as client,
        client.get("http://localhost/status/stream") as stream,
    ):
        while True:
            assert await stream.content.readuntil(b"\n\n")


async def p99_ms(folder: pathlib.Path) -> float:
    """Of query-status over the unix socket, for ROUND_S."""
    reader, writer = await asyncio.open_unix_connection(str(folder / "qmp"))
    try:
        await reader.readline()
        latencies_ms = []
        end_s = time.monotonic() + ROUND_S
        for number in itertools.count():
            begin_s = time.perf_counter()
            command = "query-status" if number else "qmp_capabilities"
            writer.write(b'{"execute": "%s", "id": %d}' % (command.encode(), number))
            while b'"id": %d}' % number not in await reader.readline():
                pass  # an event
            latencies_ms.append((time.perf_counter() - begin_s) * 1e3)
            if time.monotonic() > end_s:
                break
        return sorted(latencies_ms)[len(latencies_ms) * 99 // 100]
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.slow
async def test_qmp_answers_in_time_while_pages_are_polled_and_guests_are_sent(tmp_path: pathlib.Path) -> None:
    """The best of a few rounds counts: others on the same processors can only make it worse."""
    async with busy_process(tmp_path) as counts:
        visitors = [asyncio.create_task(visit(tmp_path)) for visit in (poll, watch)]
        rounds: list[float] = []
        while len(rounds) < ROUNDS and min(rounds, default=QMP_P99_MS) >= QMP_P99_MS:
            rounds.append(await p99_ms(tmp_path))
            assert not any(visitor.done() for visitor in visitors), visitors
        for visitor in visitors:
            visitor.cancel()
    assert min(counts) > 0, "both guests were sent meanwhile"
    assert min(rounds) < QMP_P99_MS, rounds
