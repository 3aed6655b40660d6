"""`-http` over the fakes: tokens and their files, what the page and the metrics are given, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import re
import stat
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.vmm.control.fakes import FakeVm, make_vm
from tests.vmm.control.test_metrics import read
from vmm.config import HttpConfig
from vmm.control.http import HttpControl
from vmm.errors import ChardevError, OptionError

pytestmark = pytest.mark.asyncio


@contextlib.asynccontextmanager
async def served(**config: Any) -> AsyncIterator[tuple[FakeVm, HttpControl]]:
    """A fake VM with HTTP on a free port, or where `config` says."""
    vm = make_vm(asyncio.get_running_loop())
    settings = HttpConfig("-http x", **({"host": "127.0.0.1"} | config))
    http = HttpControl(settings, vm.control, vm.machine, vm.migrator, lambda: 3)
    try:
        await http.open()
        http.release()
        yield vm, http
    finally:
        await http.close(0.1)


async def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    async with aiohttp.ClientSession() as client, client.get(url, headers=headers) as response:
        return response.status, await response.text()


async def greeting(url: str, token: str) -> Any:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as client,
        client.ws_connect(f"{url}qmp") as wire,
    ):
        return await wire.receive_json()


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where new tokens go."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


async def test_a_new_token(runtime_folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (_, http):
        (path,) = runtime_folder.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert str(path) in caplog.text
        token = path.read_text().strip()
        assert len(token) >= 40
        assert token not in caplog.text
        assert "QMP" in await greeting(http.url, token)
        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            await greeting(http.url, "x" * len(token))
    assert not path.exists(), "it is removed at the end"


async def test_a_given_token(tmp_path: pathlib.Path, runtime_folder: pathlib.Path) -> None:
    path = tmp_path / "token"
    path.write_text("sixteen-letters-\n")
    path.chmod(0o600)
    async with served(token_path=str(path)) as (_, http):
        assert "QMP" in await greeting(http.url, "sixteen-letters-")
    assert path.exists(), "it is its owner's"
    assert not list(runtime_folder.iterdir())


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"sixteen-letters-", 0o640, "can be read by others: expected mode 0600, got 0640"),
        (b"sixteen-letters-", 0o604, "can be read by others"),
        (b"short", 0o600, "is not one line of 16 to 4096 characters"),
        (b"", 0o600, "is not one line"),
        (b"x" * 5000, 0o600, "is not one line"),
        (b"two lines of\nletters", 0o600, "is not one line"),
        (b"a token with spaces", 0o600, "is not one line"),
        (b"t\xc3\xb6ken-of-letters-", 0o600, "Cannot read the token in .*: it is not ASCII text"),
        (None, 0o600, "Cannot read the token in .*: No such file"),
    ],
)
async def test_a_bad_token(tmp_path: pathlib.Path, content: bytes | None, mode: int, message: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(OptionError, match=message) as error:
        async with served(token_path=str(path)):
            pass
    assert content is None or content in (b"", b"short") or content.decode("latin-1") not in str(error.value)


async def test_an_address_that_is_taken(runtime_folder: pathlib.Path) -> None:
    async with served() as (_, http):
        port = int(re.findall(r":(\d+)/", http.url)[0])
        with pytest.raises(ChardevError, match=r"-http x: Failed to bind .*Address already in use"):
            async with served(port=port):
                pass
        assert len(list(runtime_folder.iterdir())) == 1, "the failed one has removed its token"


async def test_on_a_unix_socket(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    async with served(path=str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connector = aiohttp.UnixConnector(str(path))
        async with (
            aiohttp.ClientSession(connector=connector) as client,
            client.get("http://localhost/") as response,
        ):
            assert response.status == 200
    assert not path.exists()


async def test_a_socket_that_another_has_replaced_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    async with served(path=str(path)):
        path.unlink()
        path.write_text("another's")
    assert path.exists()


async def test_the_page_is_whole() -> None:
    """Every file that one refers to is served, and nothing comes from elsewhere."""
    async with served() as (_, http):
        to_read, seen = ["/"], set()
        while to_read:
            path = to_read.pop()
            seen.add(path)
            status, text = await get(http.url.rstrip("/") + path)
            assert status == 200, path
            if path.endswith((".js", ".css")) or path == "/":
                found = re.findall(
                    r"""(?:href|src)="([^"]+)"|from "([^"]+)"|EventSource\("([^"]+)"\)""", text
                )
                links = {link for groups in found for link in groups if link}
                assert all(link.startswith("/") for link in links), links
                assert not re.search(r"innerHTML|document\.write|eval\(|style=", text), path
                to_read += links - seen - {"/status/stream", "/docs", "/schema"}
        assert {
            "/page.js",
            "/charts.js",
            "/format.js",
            "/page.css",
            "/icon.svg",
            "/metrics",
            "/status",
        } <= seen


async def test_status() -> None:
    async with served() as (vm, http):
        vm.machine.config.name = "a <guest>"
        vm.machine.cont()
        status = json.loads((await get(f"{http.url}status"))[1])
        assert (status["name"], status["runState"], status["migration"]) == ("a <guest>", "running", None)
        assert status["pid"] == os.getpid()
        assert [event["name"] for event in status["events"]] == ["RESUME"]
        vm.migrator.pretend_completed()
        status = json.loads((await get(f"{http.url}status"))[1])
        assert (status["migration"]["status"], status["migration"]["progress"]) == ("completed", 1)


async def test_the_stream_shows_what_happens_at_once() -> None:
    async with (
        served() as (vm, http),
        aiohttp.ClientSession() as client,
        client.get(f"{http.url}status/stream") as response,
    ):

        async def wait_for(state: str) -> None:
            async with asyncio.timeout(60):
                while json.loads((await response.content.readuntil(b"\n\n"))[6:])["runState"] != state:
                    pass

        await wait_for("prelaunch")
        vm.machine.cont()
        await wait_for("running")
        vm.machine.stop()
        await wait_for("paused")


async def test_metrics() -> None:
    async with served() as (vm, http):
        vm.machine.cont()
        families = read((await get(f"{http.url}metrics"))[1])
        assert families["pageferry_run_state"]['pageferry_run_state{state="running"}'] == 1
        assert sum(families["pageferry_run_state"].values()) == 1
        assert families["pageferry_qmp_clients"]['pageferry_qmp_clients{transport="socket"}'] == 3
        assert families["pageferry_qmp_events_total"] == {"pageferry_qmp_events_total": 1}
        assert families["pageferry_migrations_total"] == {
            'pageferry_migrations_total{role="source",result="completed"}': 2,
            'pageferry_migrations_total{role="destination",result="failed"}': 1,
        }
        assert "pageferry_migration_total_bytes" not in families
        vm.migrator.pretend_completed()
        families = read((await get(f"{http.url}metrics"))[1])
        assert families["pageferry_migration_total_seconds"] == {"pageferry_migration_total_seconds": 0.303}
        vm.migrator.info = {"status": "setup"}
        families = read((await get(f"{http.url}metrics"))[1])
        assert families["pageferry_migration_status"]['pageferry_migration_status{state="setup"}'] == 1


async def test_the_last_figures_stay_for_a_scraper_that_comes_later() -> None:
    async with served() as (vm, http):
        vm.migrator.pretend_completed()
        vm.migrator.info["status"] = "active"
        await get(f"{http.url}status")
        vm.migrator.info = {"status": "failed", "error-desc": "Gone"}
        families = read((await get(f"{http.url}metrics"))[1])
        assert families["pageferry_migration_status"]['pageferry_migration_status{state="failed"}'] == 1
        assert families["pageferry_migration_total_seconds"] == {"pageferry_migration_total_seconds": 0.303}
