"""Bad input over QMP gets a clear error and loses nothing; no userfaultfd costs postcopy only."""

from __future__ import annotations

import asyncio
import os
import pathlib
import socket
import sys

import pytest
from qemu.qmp import ExecuteError

from tests.functional.harness import NOBODY, VM, Pair, Stable, guest_options
from tests.support.moves import (
    AUDITOR,
    DIRTIER,
    DIRTIER_BANDWIDTH,
    MIB,
    auditor_lives,
    check_moved_whole,
    check_running_auditor,
    error_of,
    limits,
    needs_root,
    stall_in_first_pass,
    wait_status,
)
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio

LONG = "/tmp/" + "x" * 120
CURE = (
    "run as root, or give this user access to /dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1; "
    "in a container also allow userfaultfd in its seccomp profile"
)


async def refusal(machine: VM, command: str, **arguments: object) -> str:
    """The text with which a command is refused."""
    with pytest.raises(ExecuteError) as caught:
        await machine.qmp(command, **arguments)
    assert caught.value.error_class == "GenericError"
    return str(caught.value)


async def test_bad_uris(stable: Stable) -> None:
    """Refused at once, with QEMU's words; the guest runs on, and no migration is remembered."""
    source = await stable.start("source", *AUDITOR())
    before = await source.qmp("query-migrate")
    for uri, text in (
        ("nonsense", "Parameter 'uri' expects a valid migration protocol"),
        ("", "Parameter 'uri' expects a valid migration protocol"),
        ("ftp:somewhere", "Parameter 'uri' expects a valid migration protocol"),
        ("unix:", "invalid Unix socket address"),
        (f"unix:{LONG}", f"UNIX socket path '{LONG}' is too long: 125 bytes, must be less than 108 bytes"),
        ("tcp:", "error parsing address ''"),
        ("tcp:127.0.0.1", "error parsing address '127.0.0.1'"),
        ("fd:unknown", "File descriptor named 'unknown' has not been found"),
        ("fd:4000", "File descriptor 4000 is not open: Bad file descriptor"),
        ("file:/nowhere/at/all", "No such file or directory"),
    ):
        assert text in await refusal(source, "migrate", uri=uri), uri
        assert await source.qmp("query-migrate") == before == {}, uri
    assert (await source.qmp("query-status"))["status"] == "running"
    await auditor_lives(source)


async def test_bad_incoming_uris(stable: Stable, tmp_path: pathlib.Path) -> None:
    """The destination stays ready: after all of these it takes a guest."""
    source, destination = await asyncio.gather(
        stable.start("source", *AUDITOR()), stable.start("destination", *AUDITOR(), "-incoming", "defer")
    )
    for uri, text in (
        ("nonsense", "unknown migration protocol: nonsense"),
        (f"unix:{LONG}", f"UNIX socket path '{LONG}' is too long: 125 bytes, must be less than 108 bytes"),
        ("unix:/nowhere/socket", "Failed to bind socket to /nowhere/socket: No such file or directory"),
        ("file:/nowhere/file", "No such file or directory"),
    ):
        assert text in await refusal(destination, "migrate-incoming", uri=uri), uri
    incoming = await refusal(source, "migrate-incoming", uri=f"unix:{tmp_path}/m")
    assert incoming == "'-incoming' was not specified on the command line"
    pair = Pair(source, destination)
    await pair.precopy()
    again = await refusal(destination, "migrate-incoming", uri=f"unix:{tmp_path}/m")
    assert again == "The incoming migration has already been started"
    await check_running_auditor(pair)


async def test_nobody_there(stable: Stable, tmp_path: pathlib.Path) -> None:
    source = await stable.start("source", *AUDITOR())
    (tmp_path / "plain").write_text("not a socket")
    for uri, text in (
        (f"unix:{tmp_path}/absent", f"Failed to connect to '{tmp_path}/absent': No such file or directory"),
        (f"unix:{tmp_path}/plain", f"Failed to connect to '{tmp_path}/plain': Connection refused"),
        ("tcp:127.0.0.1:1", "Failed to connect to '127.0.0.1:1': Connection refused"),
        ("tcp:127.0.0.1:no-such-service", "address resolution failed for 127.0.0.1:no-such-service"),
    ):
        await source.qmp("migrate", uri=uri)
        assert text in await error_of(source), uri
        assert (await source.qmp("query-status"))["status"] == "running", uri
    await auditor_lives(source)


async def test_strangers_at_the_door(stable: Stable) -> None:
    """Whatever says something else than a migration stream is told off; the next one may be a source."""
    source, destination = await asyncio.gather(
        stable.start("source", *AUDITOR()), stable.start("destination", *AUDITOR(), "-incoming", "defer")
    )
    pair = Pair(source, destination)
    await pair.set_capabilities(events=True)
    await destination.qmp("migrate-incoming", uri=pair.uri)
    for junk, text in (
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "Not a migration stream"),
        (b"", "end of stream"),
        (b"QEVM\0\0\0\2", "SaveVM v2 format is obsolete and don't work anymore: expected 3, got 2"),
        (b"QEVM\0\0\0\3\7\0\0\0\4q35!", "Machine type of the source: expected 'microvm', got 'q35!'"),
        (b"QEVM\0\0\0\3\7\xff\xff\xff\xff", "machine name"),
    ):
        since = destination.mark()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(pair.uri.removeprefix("unix:"))
            stranger.sendall(junk)
            stranger.shutdown(socket.SHUT_WR)
            await destination.wait_event(
                "MIGRATION", lambda event: event["data"]["status"] == "failed", since=since
            )
        assert text in await error_of(destination), junk
        assert (await destination.qmp("query-status"))["status"] == "inmigrate"
    await source.qmp("migrate", uri=pair.uri)
    await source.wait_migration()
    await check_running_auditor(pair)


async def test_another_ram_size(stable: Stable) -> None:
    source, other = await asyncio.gather(
        stable.start("source", *guest_options("auditor", "pages=64 beat=16", memory="16M")),
        stable.start("other", *guest_options("auditor", memory="24M"), "-incoming", "defer"),
    )
    pair = Pair(source, other)
    await pair.begin()
    assert "Sibling indicated error 1" in await error_of(source)
    assert await error_of(other) == (
        "Length mismatch of RAMBlock 'microvm.ram': expected 0x1800000, got 0x1000000"
    )
    assert (await source.qmp("query-status"))["status"] == "running"
    await auditor_lives(source)


async def test_not_while_migrating(stable: Stable) -> None:
    """Capabilities, a second migrate, and reading the guest's state: each refused or answered, none hangs."""
    pair = await stable.pair(*AUDITOR())
    source, destination = pair.source, pair.destination
    await limits(source, max_bandwidth=MIB)
    await pair.begin()
    await wait_status(source, "active")
    await wait_status(destination, "active")
    change = [{"capability": "postcopy-ram", "state": True}]
    for machine in (source, destination):
        text = await refusal(machine, "migrate-set-capabilities", capabilities=change)
        assert text == "There's a migration process in progress"
    assert await refusal(source, "migrate", uri=pair.uri) == "There's a migration process in progress"
    assert await refusal(destination, "migrate", uri=pair.uri) == (
        "Guest is waiting for an incoming migration"
    )
    assert await refusal(source, "migrate-start-postcopy") == (
        "Enable postcopy with migrate_set_capability before the start of migration"
    )
    assert await refusal(source, "migrate-continue", state="pre-switchover") == (
        "Migration not in expected state: active"
    )
    await limits(source, max_bandwidth=0)
    await pair.finish()
    assert await refusal(source, "migrate", uri=pair.uri) == (
        "Can't migrate the vm that was paused due to previous migration"
    )
    await check_running_auditor(pair)


# ---- no userfaultfd ----


class WithoutUserfaultfd(VM):
    """A VM that may not open a userfaultfd."""

    program = (sys.executable, "-m", "tests.support.no_userfaultfd", *VM.program)


async def test_without_userfaultfd_postcopy_is_refused_and_precopy_works(stable: Stable) -> None:
    needs_root()
    if os.access("/dev/userfaultfd", os.R_OK) and os.stat("/dev/userfaultfd").st_mode & 0o006:
        pytest.skip("/dev/userfaultfd is open to everyone here")
    incoming = ("-incoming", "defer", "-S")
    pair = await stable.pair(*DIRTIER(), incoming=incoming, kind=WithoutUserfaultfd, user=NOBODY)
    source, destination = pair.source, pair.destination
    change = [{"capability": "postcopy-ram", "state": True}, {"capability": "events", "state": True}]
    for machine in (source, destination):
        text = await refusal(machine, "migrate-set-capabilities", capabilities=change)
        assert text.startswith("Postcopy is not supported: userfaultfd is not to be had (")
        assert "EPERM" in text
        assert text.endswith(CURE)
        states = {c["capability"]: c["state"] for c in await machine.qmp("query-migrate-capabilities")}
        assert not states["postcopy-ram"]
        assert not states["events"], "all or nothing"
    await source.wait_output(lambda text: "AB" in text)
    await stall_in_first_pass(pair, DIRTIER_BANDWIDTH)
    await limits(source, max_bandwidth=0, downtime_limit=2000)
    shown, _ = await pair.finish()
    assert shown["x-dirty-log"] == {"rung": "engine"}
    assert shown["x-postcopy"]["resent-pages"] > 0
    await check_moved_whole(pair)


async def test_a_destination_without_userfaultfd_refuses_a_postcopy_source(stable: Stable) -> None:
    """The source can, the destination cannot: told at ADVISE, before anything is lost."""
    requires("uffd")
    needs_root()
    source, destination = await asyncio.gather(
        stable.start("source", *AUDITOR()),
        stable.start("destination", *AUDITOR(), "-incoming", "defer", kind=WithoutUserfaultfd, user=NOBODY),
    )
    pair = Pair(source, destination)
    await source.set_capabilities(postcopy_ram=True)
    await destination.qmp("migrate-incoming", uri=pair.uri)
    await source.qmp("migrate", uri=pair.uri)
    assert "Sibling indicated error 1" in await error_of(source)
    assert await error_of(destination) == "RAM postcopy is disabled but have 16 byte advise"
    assert (await source.qmp("query-status"))["status"] == "running"
    await source.set_capabilities(postcopy_ram=False)
    await source.qmp("migrate", uri=pair.uri)
    await pair.finish()
    await check_running_auditor(pair)
