"""`file:` and `exec:` that cannot take the guest: the cause is told, it runs on, nothing half is left."""

from __future__ import annotations

import asyncio
import errno
import os
import pathlib
import resource
import subprocess
from collections.abc import Iterator

import pytest

from tests.functional.harness import VM, Pair, Stable
from tests.support.moves import AUDITOR, MIB, auditor_lives, check_running_auditor, error_of, limits

pytestmark = pytest.mark.asyncio


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MiB."""
    if os.geteuid():
        pytest.skip("only root may mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "none", disk], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


async def check_stays(source: VM) -> None:
    """The guest runs here, and can still leave."""
    assert (await source.qmp("query-status"))["status"] == "running"
    await auditor_lives(source)


async def check_can_leave(stable: Stable, source: VM) -> None:
    destination = await stable.start("destination", *AUDITOR(), "-incoming", "defer")
    pair = Pair(source, destination)
    await pair.precopy()
    await check_running_auditor(pair)


async def test_a_full_disk(stable: Stable, small_disk: pathlib.Path) -> None:
    source = await stable.start("source", *AUDITOR())
    await auditor_lives(source)
    (small_disk / "state").write_text("the last one")
    await source.qmp("migrate", uri=f"file:{small_disk}/state")
    text = await error_of(source)
    assert text.startswith(f"Unable to write to file '{small_disk}/state' after ")
    assert text.endswith(" bytes: No space left on device")
    assert [path.name for path in small_disk.iterdir()] == ["state"]
    assert (small_disk / "state").read_text() == "the last one"
    await check_stays(source)
    await source.qmp("migrate", uri=f"exec:cat > {small_disk}/state")
    assert "ended with status 1 after " in await error_of(source)
    await check_stays(source)
    await source.qmp("migrate", uri="file:/dev/full")
    assert (await error_of(source)).endswith("bytes: No space left on device")
    assert pathlib.Path("/dev/full").is_char_device()
    await check_stays(source)
    await check_can_leave(stable, source)


async def test_short_writes_and_a_limit(stable: Stable, tmp_path: pathlib.Path) -> None:
    """The kernel takes a part of what is written, then no more: RLIMIT_FSIZE."""
    source = await stable.start("source", *AUDITOR())
    limit = 1_234_567
    resource.prlimit(source.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        await source.qmp("migrate", uri=f"file:{tmp_path}/state")
        assert await error_of(source) == (
            f"Unable to write to file '{tmp_path}/state' after {limit} bytes: File too large"
        )
    finally:
        resource.prlimit(source.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list(tmp_path.iterdir())
    await check_stays(source)


async def test_an_input_output_error(stable: Stable) -> None:
    """The one file that gives EIO everywhere: a process's memory, where nothing is mapped."""
    source = await stable.start("source", *AUDITOR())
    await source.qmp("migrate", uri="file:/proc/self/mem,offset=4096")
    assert (await error_of(source)).endswith(f"after 0 bytes: {os.strerror(errno.EIO)}")
    await check_stays(source)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("head -c 100000 > /dev/null; kill -9 $$", "was ended by signal 9 (Killed) after "),
        ("exec 0<&-; sleep 60", "does not read any more after "),
        ("cat > /dev/null; exit 7", "ended with status 7"),
        ("no-such-command-anywhere", "ended with status 127"),
    ],
)
async def test_a_command_that_dies(stable: Stable, command: str, words: str) -> None:
    source = await stable.start("source", *AUDITOR())
    await source.qmp("migrate", uri=f"exec:{command}")
    assert words in await error_of(source)
    await check_stays(source)
    await check_no_children(source)


async def check_no_children(source: VM) -> None:
    """Of a pipeline, too."""
    children = pathlib.Path(f"/proc/{source.pid}/task/{source.pid}/children")
    async with asyncio.timeout(60):
        while children.read_text().strip():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "uri",
    [
        "exec:sleep 1000 | cat",  # never reads
        "exec:cat > /dev/null; sleep 1000",  # has read everything, and never ends
        "file:{fifo}",  # a FIFO whose reader does not read
        "file:{folder}/state",
    ],
)
async def test_cancel(stable: Stable, tmp_path: pathlib.Path, uri: str) -> None:
    """Within each of them, and whatever they started is ended."""
    source = await stable.start("source", *AUDITOR())
    await source.set_capabilities(events=True)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    folder = tmp_path / "folder"
    folder.mkdir()
    try:
        if "folder" in uri:
            await limits(source, max_bandwidth=MIB)
        await source.qmp("migrate", uri=uri.format(fifo=fifo, folder=folder))
        await source.wait_event("MIGRATION", lambda event: event["data"]["status"] == "active")
        if "/dev/null" in uri:
            await source.wait_run_state("finish-migrate")
        assert fifo.is_fifo()
        await source.qmp("migrate_cancel")
        await source.wait_migration("cancelled", timeout_s=60)
    finally:
        os.close(reader)
    assert not list(folder.iterdir())
    await check_stays(source)
    await check_no_children(source)


async def test_killed_while_it_writes(stable: Stable, tmp_path: pathlib.Path) -> None:
    """Nothing is under the final name; what was there before is as it was."""
    state = tmp_path / "state"
    state.write_text("the last one")
    source = await stable.start("source", *AUDITOR())
    await limits(source, max_bandwidth=MIB)
    await source.qmp("migrate", uri=f"file:{state}")
    async with asyncio.timeout(60):
        while not any(path.stat().st_size > 100_000 for path in tmp_path.glob("state.part-*")):
            await asyncio.sleep(0.01)
    source.kill()
    assert state.read_text() == "the last one"


async def test_the_final_name_cannot_be_had(stable: Stable, tmp_path: pathlib.Path) -> None:
    """All was written, and the rename fails: the guest is nowhere else, so it runs on here."""
    folder = tmp_path / "folder"
    folder.mkdir()
    source = await stable.start("source", *AUDITOR())
    await source.qmp(
        "migrate-set-capabilities", capabilities=[{"capability": "pause-before-switchover", "state": True}]
    )
    await source.qmp("migrate", uri=f"file:{folder}/state")
    await source.wait_migration("pre-switchover")
    (folder / "state").mkdir()
    await source.qmp("migrate-continue", state="pre-switchover")
    assert "Is a directory" in await error_of(source)
    assert [path.name for path in folder.iterdir()] == ["state"]
    await check_stays(source)
