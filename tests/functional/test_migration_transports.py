"""Each transport, both ways round; and the use of a file: stop, migrate, quit, and later go on from it."""

from __future__ import annotations

import contextlib
import gzip
import os
import pathlib
import socket
import stat

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import VM, Pair, Stable, VmError, audit
from tests.support.moves import (
    AUDITOR,
    auditor_lives,
    check_running_auditor,
    finish_postcopy,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio


async def running_source(stable: Stable) -> VM:
    source = await stable.start("source", *AUDITOR())
    await auditor_lives(source)
    return source


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
async def test_tcp(stable: Stable, way: str) -> None:
    """The destination tells which port it was given."""
    source = await running_source(stable)
    destination = await stable.start("destination", *AUDITOR(), "-incoming", "defer")
    pair = Pair(source, destination)
    await pair.set_capabilities(events=True, postcopy_ram=way == "postcopy")
    await destination.qmp("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = (await destination.qmp("query-migrate"))["socket-address"]
    assert address["type"] == "inet"
    assert address["host"] == "127.0.0.1"
    assert int(address["port"]) > 0
    uri = f"tcp:127.0.0.1:{address['port']}"
    if way == "postcopy":
        requires("uffd")
        await source.qmp("migrate-set-parameters", max_bandwidth=1, max_postcopy_bandwidth=1)
    await source.qmp("migrate", uri=uri)
    if way == "postcopy":
        await source.qmp("migrate-start-postcopy")
        await finish_postcopy(pair)
    await pair.finish()
    await check_running_auditor(pair)


async def test_unix_given_on_the_command_line(stable: Stable, tmp_path: pathlib.Path) -> None:
    source = await running_source(stable)
    uri = f"unix:{tmp_path}/m,with=a comma"
    destination = await stable.start("destination", *AUDITOR(), "-incoming", uri)
    await source.qmp("migrate", uri=uri)
    pair = Pair(source, destination)
    await pair.finish()
    await check_running_auditor(pair)


@pytest.mark.parametrize("way", ["precopy", "postcopy"])
async def test_fd_passed_by_getfd(stable: Stable, way: str) -> None:
    """Through the one QMP connection: a name is known to the monitor that it was given to."""
    if way == "postcopy":
        requires("uffd")
    source = await running_source(stable)
    destination = await stable.start("destination", *AUDITOR(), "-incoming", "defer")
    pair = Pair(source, destination)
    await pair.set_capabilities(events=True, postcopy_ram=way == "postcopy")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for machine, end in ((source, ours), (destination, theirs)):
            machine.client.send_fd_scm(end.fileno())
            await machine.qmp("getfd", fdname="wire")
    await destination.qmp("migrate-incoming", uri="fd:wire")
    if way == "postcopy":
        await source.qmp("migrate-set-parameters", max_bandwidth=1, max_postcopy_bandwidth=1)
    await source.qmp("migrate", uri="fd:wire")
    if way == "postcopy":
        await source.qmp("migrate-start-postcopy")
        await finish_postcopy(pair)
    await pair.finish()
    await check_running_auditor(pair)
    for machine in (source, destination):  # the migration took it
        with pytest.raises(ExecuteError, match="File descriptor named 'wire' not found"):
            await machine.qmp("closefd", fdname="wire")


class InheritingVM(VM):
    """A VM that finds the file $STREAM open as descriptor 7."""

    program = ("/bin/sh", "-c", 'exec 7<"$STREAM"; exec "$0" "$@"', *VM.program)


async def test_exec_out_and_an_inherited_descriptor_in(stable: Stable, tmp_path: pathlib.Path) -> None:
    source = await running_source(stable)
    stream = tmp_path / "stream"
    await source.qmp("migrate", uri=f"exec:gzip -1 > {stream}.gz")
    await source.wait_migration()
    stream.write_bytes(gzip.decompress(pathlib.Path(f"{stream}.gz").read_bytes()))
    destination = await stable.start(
        "destination", *AUDITOR(), "-incoming", "fd:7", kind=InheritingVM, environment={"STREAM": str(stream)}
    )
    await destination.wait_migration()
    await check_running_auditor(Pair(source, destination))


async def test_exec_in(stable: Stable, tmp_path: pathlib.Path) -> None:
    source = await running_source(stable)
    await source.qmp("migrate", uri=f"file:{tmp_path}/stream")
    await source.wait_migration()
    destination = await stable.start("destination", *AUDITOR(), "-incoming", f"exec:cat {tmp_path}/stream")
    await destination.wait_migration()
    await check_running_auditor(Pair(source, destination))


async def test_a_pipe_between_two_commands(stable: Stable, tmp_path: pathlib.Path) -> None:
    """Live, through a FIFO: the destination reads while the source writes."""
    source = await running_source(stable)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    destination = await stable.start("destination", *AUDITOR(), "-incoming", f"exec:cat {fifo}")
    await source.qmp("migrate", uri=f"exec:cat > {fifo}")
    pair = Pair(source, destination)
    await pair.finish()
    await check_running_auditor(pair)


async def test_a_command_that_fails_leaves_the_guest_here(stable: Stable) -> None:
    source = await running_source(stable)
    await source.qmp("migrate", uri="exec:head -c 1000 >/dev/null; exit 3")
    await source.wait_migration("failed")
    assert (await source.qmp("query-status"))["status"] == "running"
    shown = await source.qmp("query-migrate")
    assert "The command 'head -c 1000 >/dev/null; exit 3' ended with status 3" in shown["error-desc"]
    await auditor_lives(source)


async def test_stop_migrate_to_a_file_quit_and_go_on_later(stable: Stable, tmp_path: pathlib.Path) -> None:
    source = await running_source(stable)
    await source.qmp("stop")
    saved = tmp_path / "saved"
    await source.qmp("migrate", uri=f"file:{saved}")
    await source.wait_migration()
    before, memory = source.output(), await source.qmp("x-query-ram-digest")
    with contextlib.suppress(VmError):
        await source.qmp("quit")
    assert await source.wait_exit() == 0
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    for _ in range(2):  # the file stays what it was: a saved guest can be woken more than once
        later = await stable.start("later", *AUDITOR(), "-incoming", f"file:{saved}")
        await later.wait_migration()
        assert (await later.qmp("query-status"))["status"] == "paused"
        assert await later.qmp("x-query-ram-digest") == memory
        assert later.output() == ""
        await later.qmp("cont")
        await auditor_lives(later, before)
        await later.qmp("stop")
        verdict = audit(before, later.output())
        assert verdict.is_good, verdict


async def test_a_file_with_an_offset(stable: Stable, tmp_path: pathlib.Path) -> None:
    source = await running_source(stable)
    image = tmp_path / "image"
    image.write_bytes(b"a header of somebody else".ljust(4096, b"."))
    await source.qmp("migrate", uri=f"file:{image},offset=4k")
    await source.wait_migration()
    assert image.read_bytes()[:4096].startswith(b"a header of somebody else...")
    destination = await stable.start("destination", *AUDITOR(), "-incoming", "defer")
    await destination.qmp("migrate-incoming", uri=f"file:{image},offset=4096")
    await destination.wait_migration()
    await check_running_auditor(Pair(source, destination))


@pytest.mark.parametrize("transport", ["exec", "file", "fd"])
async def test_postcopy_over_one_way_is_refused_and_precopy_goes(
    stable: Stable, tmp_path: pathlib.Path, transport: str
) -> None:
    requires("uffd")
    source = await running_source(stable)
    await source.set_capabilities(postcopy_ram=True)
    uri = {"exec": f"exec:cat > {tmp_path}/out", "file": f"file:{tmp_path}/out", "fd": "fd:pipe"}[transport]
    if transport == "fd":
        await give_file(source, tmp_path / "out")
    with pytest.raises(ExecuteError, match="Postcopy needs a two-way transport such as tcp: or unix:, and "):
        await source.qmp("migrate", uri=uri)
    assert await source.qmp("query-migrate") == {}
    await auditor_lives(source)
    await source.set_capabilities(postcopy_ram=False)
    if transport == "fd":
        await give_file(source, tmp_path / "out")
    await source.qmp("migrate", uri=uri)
    await source.wait_migration()
    assert (tmp_path / "out").read_bytes()[:4] == b"QEVM"


async def give_file(machine: VM, path: pathlib.Path) -> None:
    """Pass a new file to a VM under the name `pipe`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        machine.client.send_fd_scm(fd)
        await machine.qmp("getfd", fdname="pipe")
    finally:
        os.close(fd)
