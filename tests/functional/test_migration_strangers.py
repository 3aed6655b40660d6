"""Whoever comes to an incoming VM, the real source is served: strangers, silent peers, damaged streams.

Stock QEMU 7.2 exits at the first of them, and a silent one keeps the real source out for ever.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.functional.harness import VM, Pair, Stable, guest_options
from tests.support.moves import AUDITOR, MIB, auditor_lives, check_running_auditor, error_of, limits
from tests.support.relay import Relay

pytestmark = pytest.mark.asyncio

JUNK = 200
SEED = 20261123
SO_LINGER_RESET = struct.pack("ii", 1, 0)
HEADER = b"QEVM\0\0\0\3"
CONFIGURATION = b"\7\0\0\0\7microvm"


def connect(uri: str) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.settimeout(60)
    stranger.connect(uri.removeprefix("unix:"))
    return stranger


async def waiting_pair(stable: Stable, **limits_there: int) -> Pair:
    """A running auditor, and a machine that waits for it."""
    source, destination = await asyncio.gather(
        stable.start("source", *AUDITOR()), stable.start("destination", *AUDITOR(), "-incoming", "defer")
    )
    pair = Pair(source, destination)
    if limits_there:
        await limits(destination, **limits_there)
    await destination.qmp("migrate-incoming", uri=pair.uri)
    return pair


def kinds(stream: bytes, rng: random.Random) -> dict[str, Callable[[], bytes | None]]:
    """Fifteen kinds of strangers: what each says before it goes; None: it stays, and says nothing."""

    def flipped() -> bytes:
        at = rng.randrange(len(HEADER), 400)
        return stream[:at] + bytes([stream[at] ^ 1 << rng.randrange(8)]) + stream[at + 1 : len(stream) // 2]

    def shuffled() -> bytes:
        at = rng.randrange(100, len(stream) // 2)
        return stream[:at] + rng.randbytes(50)

    return {
        "port scanner": lambda: b"",
        "silent": lambda: None,
        "one byte of a header, then silence": lambda: None,
        "HTTP": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "TLS": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
        "SSH": lambda: b"SSH-2.0-OpenSSH_9.2\r\n",
        "QMP": lambda: b'{"execute": "qmp_capabilities"}\n',
        "garbage": lambda: rng.randbytes(rng.randrange(1, 5000)),
        "half a header": lambda: HEADER[: rng.randrange(1, 8)],
        "another version": lambda: HEADER[:-1] + b"\2",
        "another machine": lambda: HEADER + b"\7\0\0\0\4q35!" + rng.randbytes(20),
        "an endless name": lambda: HEADER + b"\7\xff\xff\xff\xff" + b"x" * 1000,
        "truncated": lambda: stream[: rng.randrange(20, len(stream) // 2)],
        "a flipped bit at the start": flipped,
        "garbage after a part": shuffled,
    }


async def recorded(stable: Stable, folder: pathlib.Path) -> bytes:
    """All that a source sends when it moves a guest."""
    source, destination = await asyncio.gather(
        stable.start("source", *AUDITOR(), "-S"), stable.start("other", *AUDITOR(), "-incoming", "defer")
    )
    target = str(folder / "t")
    await destination.qmp("migrate-incoming", uri=f"unix:{target}")
    relay = Relay(str(folder / "relay"), target)
    try:
        await source.qmp("migrate", uri=f"unix:{folder}/relay")
        await source.wait_migration()
    finally:
        relay.close()
    return bytes(relay.stream)


def resident_bytes(machine: VM) -> int:
    """What the process has in memory now."""
    return int(pathlib.Path(f"/proc/{machine.pid}/statm").read_text().split()[1]) * 4096


def open_fds(machine: VM) -> int:
    return len(list(pathlib.Path(f"/proc/{machine.pid}/fd").iterdir()))


def junk(uri: str, stream: bytes, count: int) -> Iterator[socket.socket]:
    """`count` strangers; gives those that stay."""
    rng = random.Random(SEED)
    table = kinds(stream, rng)
    assert len(table) == 15
    for number in range(count):
        name = list(table)[number % len(table)]
        words = table[name]()
        stranger = connect(uri)
        try:
            if words is None:
                stranger.sendall(b"Q" if "byte" in name else b"")
                yield stranger
                continue
            stranger.sendall(words)
            if rng.random() < 0.3:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, SO_LINGER_RESET)
            elif rng.random() < 0.5:
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):  # until it is told off
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass  # told off in the middle of a word
        if words is not None:
            stranger.close()


async def test_two_hundred_strangers_then_the_source(stable: Stable, tmp_path: pathlib.Path) -> None:
    stream = await recorded(stable, tmp_path)
    pair = await waiting_pair(stable)
    source, destination = pair.source, pair.destination
    fds, resident = open_fds(destination), resident_bytes(destination)
    silent = await asyncio.to_thread(lambda: list(junk(pair.uri, stream, JUNK)))
    try:
        assert len(silent) == 2 * -(-JUNK // 15) - (JUNK % 15 == 1)
        async with asyncio.timeout(60):  # the last of them may still be in the backlog
            while open_fds(destination) > fds + len(silent):
                await asyncio.sleep(0.01)
        assert resident_bytes(destination) < resident + 12 * MIB, "what strangers sent is still in memory"
        assert (await destination.qmp("query-status"))["status"] == "inmigrate"
        await source.qmp("migrate", uri=pair.uri)
        await pair.finish()
    finally:
        for stranger in silent:
            stranger.close()
    await check_running_auditor(pair)


async def test_who_says_nothing_is_turned_away_in_time(stable: Stable) -> None:
    """And nobody waits for it meanwhile."""
    pair = await waiting_pair(stable, x_handshake_timeout=300)
    source, destination = pair.source, pair.destination
    began_s = time.monotonic()
    with connect(pair.uri) as silent, connect(pair.uri) as slow:
        slow.sendall(HEADER + CONFIGURATION[:-1])
        assert await asyncio.to_thread(silent.recv, 1) == b""
        with pytest.raises(ConnectionResetError):  # what it has said was not read
            await asyncio.to_thread(slow.recv, 1)
        assert 0.25 < time.monotonic() - began_s < 20
    assert "status" not in await destination.qmp("query-migrate"), "nobody has been served"
    await limits(destination, x_handshake_timeout=0)
    with connect(pair.uri):
        await source.qmp("migrate", uri=pair.uri)
        await pair.finish()
    await check_running_auditor(pair)


async def test_more_silent_peers_than_may_wait(stable: Stable) -> None:
    """The one that has been silent for longest makes room."""
    pair = await waiting_pair(stable)
    peers = [connect(pair.uri) for _ in range(70)]
    try:
        assert await asyncio.to_thread(peers[0].recv, 1) == b""
        await pair.source.qmp("migrate", uri=pair.uri)
        await pair.finish()
    finally:
        for peer in peers:
            peer.close()
    await check_running_auditor(pair)


async def test_a_second_source_waits_for_its_turn(stable: Stable) -> None:
    """While one is served, the next is not lost; it is served when the first has failed."""
    options = AUDITOR()
    first, source, destination = await asyncio.gather(
        stable.start("first", *options),
        stable.start("source", *options),
        stable.start("destination", *options, "-incoming", "defer"),
    )
    pair = Pair(source, destination)
    await destination.qmp("migrate-incoming", uri=pair.uri)
    await destination.set_capabilities(events=True)
    await limits(first, max_bandwidth=MIB)
    await first.qmp("migrate", uri=pair.uri)
    await destination.wait_event("MIGRATION", lambda event: event["data"]["status"] == "active")
    await source.qmp("migrate", uri=pair.uri)
    await first.qmp("migrate_cancel")
    await pair.finish()
    assert (await first.qmp("query-status"))["status"] == "running"
    await auditor_lives(first)
    await check_running_auditor(pair)


async def test_out_of_descriptors(stable: Stable) -> None:
    """accept() fails with EMFILE: said, and tried again until it works."""
    pair = await waiting_pair(stable)
    source, destination = pair.source, pair.destination
    import resource

    before = resource.prlimit(destination.pid, resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in pathlib.Path(f"/proc/{destination.pid}/fd").iterdir()}
    free = next(number for number in range(1000) if number not in used)
    resource.prlimit(destination.pid, resource.RLIMIT_NOFILE, (free, before[1]))
    await source.qmp("migrate", uri=pair.uri)
    async with asyncio.timeout(60):
        while "Too many open files" not in str((await destination.qmp("query-migrate")).get("error-desc")):
            await asyncio.sleep(0.02)
    resource.prlimit(destination.pid, resource.RLIMIT_NOFILE, before)
    await pair.finish()
    await check_running_auditor(pair)


@pytest.mark.parametrize("how", ["argument", "option"])
async def test_exit_on_error(stable: Stable, how: str) -> None:
    """What QEMU 7.2 does, for scripts that wait for the process to end."""
    extra = ["-global", "migration.x-exit-on-error=on"] if how == "option" else []
    machine = await stable.start("destination", *AUDITOR(), "-incoming", "defer", *extra)
    uri = f"unix:{machine.folder}/m"
    arguments = {"exit_on_error": True} if how == "argument" else {}
    await machine.qmp("migrate-incoming", uri=uri, **arguments)
    connect(uri).close()
    async with asyncio.timeout(60):
        while machine.exit_code is None:
            await asyncio.sleep(0.01)
    assert machine.exit_code == 1
    assert "incoming migration failed: Unexpected end of stream" in machine.messages()


async def test_a_command_or_file_that_has_no_guest_makes_room(stable: Stable, tmp_path: pathlib.Path) -> None:
    """One-shot: nobody else can come there, so another migrate-incoming may follow."""
    (tmp_path / "half").write_bytes(HEADER + CONFIGURATION)
    destination = await stable.start("destination", *AUDITOR(), "-incoming", f"file:{tmp_path}/half")
    assert "end of stream" in await error_of(destination)
    await destination.qmp("migrate-incoming", uri="exec:echo nothing")
    assert "Not a migration stream" in await error_of(destination)
    source = await stable.start("source", *AUDITOR())
    await auditor_lives(source)
    pair = Pair(source, destination)
    await pair.precopy()
    await check_running_auditor(pair)


async def test_the_wrong_uuid(stable: Stable) -> None:
    ours, theirs = ("-uuid", f"{1:032x}"), ("-uuid", f"{2:032x}")
    source, stranger, destination = await asyncio.gather(
        stable.start("source", *AUDITOR(), *ours),
        stable.start("stranger", *guest_options("auditor", memory="32M"), *theirs),
        stable.start("destination", *AUDITOR(), *ours, "-incoming", "defer"),
    )
    pair = Pair(source, destination)
    await destination.qmp("migrate-incoming", uri=pair.uri)
    for machine in (stranger, source):
        await machine.set_capabilities(validate_uuid=True)
    await stranger.qmp("migrate", uri=pair.uri)
    assert "UUID of the source" in await error_of(destination)
    await stranger.wait_migration("failed")
    await source.qmp("migrate", uri=pair.uri)
    await pair.finish()
    await check_running_auditor(pair)
