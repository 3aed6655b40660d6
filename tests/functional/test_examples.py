"""The examples, run as their users run them: on our machines, and where it makes a difference on stock."""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.functional.harness import NOBODY, VM, Stable, StockVM, guest_options
from tests.support.requires import requires
from tools import guest_builder
from tools.vm_process import ROOT

EXAMPLES = ROOT / "tools" / "examples"
DEADLINE_S = 100.0
SLOW = 64 << 10
"""Bytes a second at which nearly nothing is sent unasked; stock takes less than 10 for no limit."""

pytestmark = [pytest.mark.slow]


async def start(script: str, *arguments: str) -> asyncio.subprocess.Process:
    """Run an example as a user does, with nothing of ours on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-u",
        str(EXAMPLES / script),
        *arguments,
        cwd="/",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def output_of(process: asyncio.subprocess.Process) -> str:
    """What it prints; it has to succeed."""
    out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 0, out.decode()
    return out.decode()


def monitor(path: pathlib.Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]


async def pair(stable: Stable, folder: pathlib.Path, *incoming: str, kind: type[VM] = VM) -> tuple[VM, VM]:
    """Two machines, each with one monitor more for the example; `incoming` are options of the second one."""
    options = guest_options("dirtier", "end=0x1100000")
    source = await stable.start("source", *options, *monitor(folder / "a"), kind=kind)
    destination = await stable.start(
        "destination", *options, *monitor(folder / "b"), "-incoming", "defer", *incoming, kind=kind
    )
    await source.wait_output(lambda text: "A" in text)
    return source, destination


@pytest.mark.asyncio
async def test_precopy_while_somebody_watches(stable: Stable, tmp_path: pathlib.Path) -> None:
    source, destination = await pair(stable, tmp_path)
    await source.client.disconnect()  # its monitor serves one client at a time
    watcher = await start("watch.py", str(source.qmp_path))
    assert watcher.stdout is not None
    assert await watcher.stdout.readline() == b"running\n"
    wire = f"unix:{tmp_path / 'wire'}"
    shown = await output_of(await start("precopy.py", str(tmp_path / "a"), str(tmp_path / "b"), wire))
    assert re.search(r"completed in \d+ ms, the guest stood still for \d+ ms", shown)
    assert (await destination.qmp("query-status"))["running"] is True
    assert source.process is not None
    source.process.terminate()
    seen = await output_of(watcher)
    assert re.search(r'^\d\d:\d\d:\d\d\.\d{3} MIGRATION \{"status": "completed"\}$', seen, re.MULTILINE)
    assert "SHUTDOWN" in seen


@pytest.mark.asyncio
async def test_postcopy(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("uffd")
    _, destination = await pair(stable, tmp_path)
    wire = f"unix:{tmp_path / 'wire'}"
    shown = await output_of(await start("postcopy.py", str(tmp_path / "a"), str(tmp_path / "b"), wire))
    assert re.search(r"postcopy-active\n(.*\n)*completed in \d+ ms", shown)
    assert (await destination.qmp("query-status"))["running"] is True


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [VM, StockVM], ids=["ours", "stock"])
async def test_postcopy_goes_on_after_a_cut(stable: Stable, tmp_path: pathlib.Path, kind: type[VM]) -> None:
    requires("uffd")
    if kind is StockVM:
        requires("qemu")
    # The guest is held at the destination, so that nothing is asked for and the cut is in time.
    source, destination = await pair(stable, tmp_path, "-S", kind=kind)
    await source.qmp("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    await source.set_capabilities(events=True)
    wire = f"unix:{tmp_path / 'wire'}"
    running = await start("postcopy.py", str(tmp_path / "a"), str(tmp_path / "b"), wire)
    await destination.wait_run_state("paused")  # before that it would be a failure, not a pause
    await source.client.execute("migrate-pause", oob=True)
    await source.wait_event("MIGRATION", lambda event: event["data"]["status"] == "postcopy-recover")
    await source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    await destination.qmp("cont")
    shown = await output_of(running)
    assert "the connection broke" in shown
    assert "completed in" in shown
    assert (await destination.qmp("query-status"))["running"] is True


def test_the_fixtures() -> None:
    """The command of the CI job, in a copy of the folder, as an ordinary user."""
    requires("uffd")
    as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    job = (EXAMPLES / "ci-job.yml").read_text()
    assert "--security-opt seccomp=unconfined --user 1000:1000" in job
    command = re.findall(r"- run: PAGEFERRY=\S+ /tmp/venv/bin/python (.*)$", job, re.MULTILINE)[0].split()
    folder = pathlib.Path("/tmp") / f"pageferry-examples-{os.getpid()}"
    try:
        tests = folder / "vm-tests"
        tests.mkdir(parents=True)
        for name in ("conftest.py", "test_two_machines.py"):
            shutil.copy(EXAMPLES / name, tests)
        guest = shutil.copy(guest_builder.build("dirtier"), folder)
        folder.chmod(0o777)
        done = subprocess.run(
            [sys.executable, *command, "--rootdir", str(tests), "-c", "/dev/null"],
            cwd=folder,
            env={
                **os.environ,
                "PAGEFERRY": f"{sys.executable} -m vmm",
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "GUEST": str(guest),
                "HOME": "/tmp",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            **as_user,  # type: ignore[call-overload]  # a dict of keyword arguments has no precise type
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
