"""A headless Chromium, driven through chromedriver's W3C WebDriver protocol; nothing of it is left.

Source: W3C WebDriver; "Capabilities & ChromeOptions" of ChromeDriver.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

__all__ = ["Browser"]

_ARGUMENTS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1280,1080"),
)
_START_S: Final = 60.0
_POLL_S: Final = 0.02


class Browser:
    """One browser with one tab. Use as an async context manager."""

    def __init__(self) -> None:
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="pageferry-browser-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._client: aiohttp.ClientSession | None = None
        self._base = ""

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(_START_S):
                await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await self._call("DELETE", "")
        await self._close()

    async def _start(self) -> None:
        log = self._folder / "log"
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", "chromedriver", "--port=0"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "HOME": str(self._folder)},
                start_new_session=True,  # so that the whole family can be ended
            )
        while (found := re.search(r"started successfully on port (\d+)", log.read_text())) is None:
            assert self._process.poll() is None, log.read_text()
            await asyncio.sleep(_POLL_S)
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_START_S))
        self._base = f"http://127.0.0.1:{found[1]}/session"
        options = {"args": [*_ARGUMENTS, f"--user-data-dir={self._folder / 'profile'}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        wanted["alwaysMatch"]["goog:loggingPrefs"] = {"browser": "ALL"}
        session = await self._call("POST", "", {"capabilities": wanted})
        self._base += f"/{session['sessionId']}"

    async def _close(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self._client is not None
        async with self._client.request(method, self._base + path, json=body) as response:
            answer = (await response.json())["value"]
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {answer}")
        return answer

    async def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        await self._call("POST", "/url", {"url": url})

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return await self._call("POST", "/execute/sync", {"script": f"return {expression}", "args": []})

    async def wait_for(self, expression: str, timeout_s: float = 60.0) -> Any:
        """Wait until an expression is true; its value."""
        async with asyncio.timeout(timeout_s):
            while not (value := await self.evaluate(expression)):
                await asyncio.sleep(_POLL_S)
        return value

    async def complaints(self) -> list[str]:
        """What the console has shown since the last call: errors of scripts, what the policy blocked."""
        return [entry["message"] for entry in await self._call("POST", "/se/log", {"type": "browser"})]

    async def screenshot(self, path: pathlib.Path) -> None:
        """Write a picture of the window."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(await self._call("GET", "/screenshot")))
