"""What may be said to a stock peer, and what both sides check before they take a guest."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import struct

import pytest

from tests.functional.harness import VM, Stable, StockVM, audit
from tests.interop.peers import SLOW, Peers, hop, lives_on, wait_shown
from tests.support.recordings import recording
from tools.stream_walk import Item, read_described, vmdescription, walk
from vmm.vmstate import BytesSource

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

PAGEFERRY_HELLO = 0x50465259

# QEMU 7.2, written down once more, so that a slip in vmm/migration/wire.py cannot excuse itself.
STOCK_RECORDS = {
    "HEADER", "CONFIGURATION", "START", "PART", "END", "FULL", "EOF", "VMDESCRIPTION",
    "BLOCK", "PAGES", "OPEN_RETURN_PATH", "PING", "POSTCOPY_ADVISE", "POSTCOPY_RAM_DISCARD",
    "PACKAGED", "POSTCOPY_LISTEN", "POSTCOPY_RUN",
}  # fmt: skip
STOCK_SECTIONS = {
    "timer", "cpu_common", "cpu", "serial", "globalstate", "fw_cfg", "kvm-tpr-opt", "apic", "ioapic",
}  # fmt: skip
STOCK_SUBSECTIONS = {
    "cpu/poll_control_msr", "cpu/fpop_ip_dp", "cpu/msr_ia32_misc_enable", "fw_cfg/dma",
    "serial/thr_ipending", "serial/tsr", "serial/recv_fifo", "serial/xmit_fifo",
    "serial/fifo_timeout_timer", "serial/timeout_ipending", "serial/poll",
}  # fmt: skip
RETURN_PATH = {1: 4, 2: 4, 3: None, 4: 12}
"""Type -> payload bytes, of the messages that a destination has to send when nothing is cut."""


class Tap:
    """Between a source and a destination: passes everything on and keeps it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "tap"
        self.target = folder / "target"
        self.forward = bytearray()
        self.back = bytearray()

    async def __aenter__(self) -> Tap:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(str(self.target))
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(
                self._pump(reader, far_writer, self.forward), self._pump(far_reader, writer, self.back)
            )
        for end in (writer, far_writer):
            end.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray
    ) -> None:
        while data := await reader.read(1 << 16):
            kept += data
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def tapped(source: VM, destination: VM, tap: Tap, mode: str) -> None:
    """One whole migration through the tap; by postcopy hardly a page is pushed before one was asked for."""
    for machine in (source, destination):
        await machine.set_capabilities(events=True, postcopy_ram=mode == "postcopy")
    await destination.qmp("migrate-incoming", uri=f"unix:{tap.target}")
    if mode == "postcopy":
        await source.qmp("migrate-set-parameters", max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    since = source.mark()
    await source.qmp("migrate", uri=f"unix:{tap.path}")
    if mode == "postcopy":
        await source.wait_event("MIGRATION", lambda e: e["data"]["status"] == "active", since=since)
        await source.qmp("migrate-start-postcopy")
        await wait_shown(source, "ram", "postcopy-requests")
        await source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
    await source.wait_migration()
    await destination.wait_migration()


def check_stream(items: list[Item]) -> None:
    """Only what stock 7.2 knows."""
    assert {item.kind for item in items} <= STOCK_RECORDS
    assert {item.section.partition("/")[0] for item in items if item.section} <= STOCK_SECTIONS
    subsections = {key for item in items for key in item.values if "/" in key}
    serial = [item.values["state"] for item in items if item.section == "serial/0"]
    subsections |= {key for state in serial for key in state if "/" in key}
    assert subsections <= STOCK_SUBSECTIONS
    pings = [int(item.text, 16) for item in items if item.kind == "PING"]
    assert set(pings) <= {1, 2, 3, 4, PAGEFERRY_HELLO}, "a PING is answered, whatever its number"


def check_description(raw: bytes, items: list[Item]) -> None:
    """Who reads by the vmdescription alone, as QEMU's analyze-migration.py does, finds each section whole."""
    shown = vmdescription(raw)
    assert shown is not None
    sections = [item for item in items if item.section]
    names = [f"{each['name']}/{each['instance_id']}" for each in shown["devices"]]
    assert names == [item.section for item in sections]
    for item, device in zip(sections, shown["devices"], strict=True):
        source = BytesSource(raw, item.offset + 1 + 4 + 1 + len(device["name"]) + 8)
        read_described(device, source)
        assert source.read(1) == b"\x7e", f"{item.section} ends elsewhere"


def return_path(raw: bytes) -> list[tuple[int, bytes]]:
    """The messages, by the layout of 7.2."""
    messages = []
    while raw:
        kind, length = struct.unpack_from(">HH", raw)
        assert kind in RETURN_PATH
        assert RETURN_PATH[kind] in (None, length)
        payload = raw[4 : 4 + length]
        assert len(payload) == length <= 512
        messages.append((kind, payload))
        raw = raw[4 + length :]
    return messages


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
async def test_nothing_that_stock_does_not_know_is_said_to_it(
    stable: Stable, tmp_path: pathlib.Path, mode: str
) -> None:
    peers = Peers("microvm")
    ours = await peers.ours(stable, "first")
    await lives_on(ours, peers)
    stock = await peers.stock(stable, "stock")
    (tmp_path / "there").mkdir()
    async with Tap(tmp_path / "there") as tap:
        await tapped(ours, stock, tap, mode)
    check_stream(list(walk(bytes(tap.forward))))
    await lives_on(stock, peers)

    last = await peers.ours(stable, "last", "-incoming", "defer")
    (tmp_path / "back").mkdir()
    async with Tap(tmp_path / "back") as tap:
        await tapped(stock, last, tap, mode)
    messages = return_path(bytes(tap.back))
    pongs = [struct.unpack(">I", payload)[0] for kind, payload in messages if kind == 2]
    if mode == "precopy":
        assert not messages, "stock has not asked for a return path"
    else:
        assert sorted(pongs) == [1, 2, 3, 4]
        assert messages[-1] == (1, bytes(4)), "the last word is SHUT 0"
        assert any(kind in (3, 4) for kind, _ in messages)

    # And home again to stock, with what was kept: still nothing of ours in it.
    stock_again = await peers.stock(stable, "stock-again")
    (tmp_path / "again").mkdir()
    async with Tap(tmp_path / "again") as tap:
        await tapped(last, stock_again, tap, mode)
    items = list(walk(bytes(tap.forward)))
    check_stream(items)
    if mode == "precopy":
        check_description(bytes(tap.forward), items)
    sections = {item.section.partition("/")[0] for item in items if item.section}
    assert sections == STOCK_SECTIONS, "the peer's own sections go back to it"
    assert any(item.kind == "BLOCK" and "pc.bios" in item.text for item in items)


# ---- the checks before a guest is taken

ONE, OTHER = "11111111-2222-3333-4444-555555555555", "11111111-2222-3333-4444-555555555556"
NONE = ("-M", "none", "-m", "2", "-S")
STOCK = (*NONE, "-cpu", "qemu64,-apic,apic-id=0")
INCOMING = ("-incoming", "defer")


async def refused(source: VM, destination: VM, **capabilities: bool) -> str:
    """Start a migration that must not come about; gives all that the destination says of it.

    Without a return path stock calls complete whatever it could write.
    """
    await source.set_capabilities(events=True, **capabilities)
    if isinstance(source, StockVM):
        await source.set_capabilities(return_path=True)
    # So slowly that the refusal is here before the hand-over, after which nobody could take the guest back.
    await source.qmp("migrate-set-parameters", max_bandwidth=1 << 14)
    uri = f"unix:{destination.folder / 'migration'}"
    await destination.qmp("migrate-incoming", uri=uri)
    await source.qmp("migrate", uri=uri)
    await source.wait_migration("failed")
    if isinstance(destination, StockVM):
        await destination.wait_exit()
        return destination.messages()
    return str(await destination.wait_migration("failed")) + destination.messages()


async def test_another_uuid_is_refused_and_the_same_taken_by_both(stable: Stable) -> None:
    ours = await stable.start("ours", *NONE, "-uuid", ONE)
    stock = await stable.start("stock", *STOCK, *INCOMING, "-uuid", OTHER, kind=StockVM)
    assert f"UUID received is {ONE} and local is {OTHER}" in await refused(ours, stock, validate_uuid=True)
    assert (await ours.qmp("query-status"))["status"] == "prelaunch"
    stock = await stable.start("stock-same", *STOCK, *INCOMING, "-uuid", ONE, kind=StockVM)
    await hop(ours, stock, "precopy")

    await stock.set_capabilities(validate_uuid=True)
    other = await stable.start("other", *NONE, *INCOMING, "-uuid", OTHER)
    assert OTHER in await refused(stock, other)
    same = await stable.start("same", *NONE, *INCOMING, "-uuid", ONE)
    await hop(stock, same, "precopy")


async def test_another_machine_or_capability_or_memory_is_refused_by_both(stable: Stable) -> None:
    ours = await stable.start("ours", *NONE)
    stock = await stable.start("stock", "-M", "microvm", "-m", "2", *INCOMING, kind=StockVM)
    assert "Machine type received is 'none' and local is 'microvm'" in await refused(ours, stock)
    stock = await stable.start("stock-small", *STOCK, *INCOMING, "-m", "1", kind=StockVM)
    assert "ram" in await refused(ours, stock)

    # A new source each time: one of 7.2 whose guest stood still takes no second try after a failed one.
    source = await stable.start("source", *STOCK, kind=StockVM)
    target = await stable.start("microvm", "-M", "microvm", "-m", "2", *INCOMING)
    assert "'none'" in await refused(source, target)
    source = await stable.start("source-large", *STOCK, kind=StockVM)
    target = await stable.start("small", "-M", "none", "-m", "1", *INCOMING)
    assert "RAMBlock 'ram'" in await refused(source, target)
    source = await stable.start("source-shared", *STOCK, kind=StockVM)
    target = await stable.start("plain", *NONE, *INCOMING)
    assert "x-ignore-shared" in await refused(source, target, x_ignore_shared=True)


async def test_a_section_that_nobody_here_knows_is_refused_by_name_and_place(stable: Stable) -> None:
    """Another machine type's devices, under our machine's name: what is not known is not guessed."""
    raw = recording("none-tcg")
    at = next(item.offset for item in walk(raw) if item.section == "globalstate/0")
    stranger = raw[:at] + raw[at:].replace(b"\x0bglobalstate", b"\x0bglobalstuff", 1)
    machine = await stable.start("ours", *NONE, *INCOMING)
    await send(machine, stranger)
    await machine.wait_migration("failed")
    text = machine.messages()
    assert "'globalstuff' 0" in text
    assert f"offset {at}" in text
    assert "kvmclock/0" in text, "it says what is known"


async def send(machine: VM, raw: bytes) -> bytes:
    """Be a source that has recorded what it says; gives what the destination answers."""
    path = machine.folder / "migration"
    await machine.set_capabilities(events=True, postcopy_ram=True)
    await machine.qmp("migrate-incoming", uri=f"unix:{path}")
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(raw)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        writer.write_eof()
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_source_of_10_2_is_understood(stable: Stable) -> None:
    """It says that switchover starts, and asks with PING 0x42 whether the package is loaded.

    Made from a recording of 7.2, after the sources of 10.2; no such source was tried.
    """
    raw = recording("none-tcg-postcopy")
    items = list(walk(raw))
    package = next(item for item in items if item.kind == "PACKAGED")
    run = next(item for item in items if item.kind == "POSTCOPY_RUN")
    before = next(item for item in items if item.kind == "POSTCOPY_RAM_DISCARD")
    ping = struct.pack(">BHHI", 8, 2, 4, 0x42)
    switchover = struct.pack(">BHH", 8, 11, 0)
    content = package.offset + 9
    (length,) = struct.unpack_from(">I", raw, content - 4)
    newer = b"".join(
        [
            raw[: before.offset],
            switchover,
            raw[before.offset : content - 4],
            struct.pack(">I", length + len(ping)),
            raw[content : run.offset],
            ping,
            raw[run.offset :],
        ]
    )
    machine = await stable.start("ours", "-M", "none", "-m", "2", "-incoming", "defer")
    answers = return_path(await send(machine, newer))
    await machine.wait_migration()
    pongs = [struct.unpack(">I", payload)[0] for kind, payload in answers if kind == 2]
    assert sorted(pongs) == [1, 2, 3, 4, 0x42]
    await machine.wait_output(lambda text: text.count("\n") > 3)
    verdict = audit(machine.output().partition("\n")[2])
    assert verdict.is_good, verdict
