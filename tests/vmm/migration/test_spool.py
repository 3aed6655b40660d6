"""What a killed source owed is in its spool, and nothing else; one that was dismissed leaves nothing."""

from __future__ import annotations

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from vmm.migration.bitmap import Bitmap
from vmm.migration.spool import HEADER_BYTES, Keeper, SpoolError, read_spool
from vmm.ram import RAMBlock

MIGRATION = bytes(range(16))
PAGES = {"a": 130, "b": 64}

SOURCE = """
import os, signal, sys
from tests.vmm.migration.test_spool import make_keeper
path, how = sys.argv[1:]
keeper = make_keeper(path)
if how == "dismiss":
    keeper.dismiss()
    sys.exit()
sys.stdout.write(f"{keeper.pid}\\n")
sys.stdout.flush()
os.kill(os.getpid(), getattr(signal, how))
"""


def is_owed(page: int) -> bool:
    return page % 5 in (1, 2)


def content(name: str, page: int) -> bytes:
    return f"{name} {page} ".encode().ljust(4096, b"x")


def make_keeper(path: str) -> Keeper:
    """A source's RAM: every page differs, some are owed."""
    blocks = [RAMBlock(name, count * 4096) for name, count in PAGES.items()]
    owed = {block.name: Bitmap(block.page_count) for block in blocks}
    for block in blocks:
        for page in range(block.page_count):
            block.write(page * 4096, content(block.name, page))
            if is_owed(page):
                owed[block.name].set(page)
    return Keeper(path, MIGRATION, blocks, owed)


def run_source(path: pathlib.Path, how: str) -> int:
    """Run a source to its end; the keeper's process id, 0 if it was dismissed."""
    done = subprocess.run(
        [sys.executable, "-c", SOURCE, str(path), how],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == (0 if how == "dismiss" else -getattr(signal, how)), done.stderr
    return int(done.stdout or 0)


def wait_gone(pid: int) -> None:
    """The keeper is not our child: wait for its end by its pidfd."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(10_000)
    finally:
        os.close(handle)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_the_spool_of_a_killed_source_has_what_was_owed(tmp_path: pathlib.Path, how: str) -> None:
    path = tmp_path / "spool"
    wait_gone(run_source(path, how))
    spool = read_spool(str(path))
    assert spool.migration == MIGRATION
    assert {block.name: block.pages for block in spool.blocks} == PAGES
    data = path.read_bytes()
    for block in spool.blocks:
        owed = spool.owed(block)
        for page in range(block.pages):
            at = block.pages_at + page * 4096
            assert owed.test(page) == is_owed(page)
            assert data[at : at + 4096] == (content(block.name, page) if is_owed(page) else bytes(4096))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["spool"]


def test_a_dismissed_keeper_leaves_nothing(tmp_path: pathlib.Path) -> None:
    run_source(tmp_path / "spool", "dismiss")
    assert not list(tmp_path.iterdir())


def test_a_keeper_in_this_process_is_reaped(tmp_path: pathlib.Path) -> None:
    keeper = make_keeper(str(tmp_path / "spool"))
    keeper.dismiss()
    with pytest.raises(ProcessLookupError):
        os.kill(keeper.pid, 0)


def test_a_disk_without_room_leaves_no_spool() -> None:
    path = pathlib.Path("/proc/self/spool")  # nothing can be made there
    wait_gone(run_source(path, "SIGKILL"))
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "not a spool"),
        (lambda data: b"{}".ljust(len(data)), "not a spool"),
        (lambda data: data[:-1], "expected"),
        (lambda data: _changed(data, "pageferry-spool", 2), "version 2, expected 1"),
        (lambda data: _changed(data, "migration", "no hex"), "not a spool"),
        (lambda data: _changed(data, "blocks", []), "RAMBlocks"),
        (lambda data: data.replace(b'"pages": 130', b'"pages": 131', 1), "lie where"),
    ],
)
def test_what_is_no_spool_is_refused(
    tmp_path: pathlib.Path, change: Callable[[bytes], bytes], says: str
) -> None:
    path = tmp_path / "spool"
    wait_gone(run_source(path, "SIGKILL"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SpoolError, match=says):
        read_spool(str(path))


def _changed(data: bytes, key: str, value: object) -> bytes:
    header = json.loads(data[:HEADER_BYTES]) | {key: value}
    return json.dumps(header).encode().ljust(HEADER_BYTES) + data[HEADER_BYTES:]
