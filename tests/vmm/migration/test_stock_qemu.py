"""Streams of the installed stock QEMU 7.2, read to the last byte and written again; and ours, read by it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.requires import requires
from vmm.control.human_info import capabilities_text, parameters_text
from vmm.cpu.state import CPU_COMMON_DESCRIPTION, CPU_DESCRIPTION
from vmm.errors import StreamTruncated, VMStateError
from vmm.migration import commands, errors, stream
from vmm.migration.params import Capabilities, Capability, Parameters
from vmm.migration.ram_records import EndOfBody, MemSize, Page, RamReader, RamWriter, ZeroPage, check_mem_size
from vmm.migration.return_path import MessageWriter, Pong, Shut
from vmm.migration.status import Role
from vmm.migration.uri import parse_uri
from vmm.vmstate import ByteSource, BytesSource, Description, Field, decode, encode

MIB = 1 << 20
BLOCKS = {"ram": MIB}
UUID = "12345678-9abc-def0-1234-56789abcdef0"
DESCRIPTIONS = {
    "cpu": CPU_DESCRIPTION,
    "cpu_common": CPU_COMMON_DESCRIPTION,
    "timer": Description(
        "timer",
        2,
        2,
        (
            Field("cpu_ticks_offset", "int64"),
            Field("unused", "unused", 8),
            Field("cpu_clock_offset", "int64"),
        ),
    ),
    "globalstate": Description(
        "globalstate", 1, 1, (Field("size", "uint32"), Field("runstate", "buffer", 100))
    ),
}


class StockQemu:
    """One stock QEMU with the machine "none", stopped, and QMP on its standard input and output."""

    def __init__(self, *options: str) -> None:
        machine = [
            "-M",
            "none",
            "-m",
            "1",
            "-cpu",
            "qemu64,-apic,apic-id=0",
            "-S",
            "-nodefaults",
            "-display",
            "none",
        ]
        self._process = subprocess.Popen(
            ["qemu-system-x86_64", *machine, "-qmp", "stdio", "-uuid", UUID, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._events: list[dict[str, Any]] = []
        self._read()
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        message: dict[str, Any] = json.loads(self._process.stdout.readline())
        return message

    def command(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The whole reply; events before it are kept."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        while "event" in (message := self._read()):
            self._events.append(message)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        return self.command(command, **arguments)["return"]

    def refusal(self, command: str, **arguments: Any) -> str:
        """The text of the error that the command gives, empty if it gives none."""
        return str(self.command(command, **arguments).get("error", {}).get("desc", ""))

    def set_capabilities(self, *names: str) -> None:
        on = [{"capability": name, "state": True} for name in names]
        self.execute("migrate-set-capabilities", capabilities=on)

    def wait_migrated(self) -> None:
        """Until MIGRATION says completed; capability events must be on."""
        while True:
            event = self._events.pop(0) if self._events else self._read()
            status = event.get("data", {}).get("status")
            assert status != "failed"
            if status == "completed":
                return

    def migrate(self, path: pathlib.Path) -> bytes:
        """The stream that this process writes to a socket at `path`.

        Not exec:cat: stock says completed while cat still has the end of the stream in its pipe.
        """
        with self.connected(path) as connection:
            raw = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        self.wait_migrated()
        return raw

    def connected(self, path: pathlib.Path) -> socket.socket:
        """Where this process has begun to migrate to: a socket at `path`."""
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            server.settimeout(60)
            self.execute("migrate", uri=f"unix:{path}")
            connection, _ = server.accept()
        connection.settimeout(60)
        return connection

    def close(self) -> None:
        self._process.communicate(json.dumps({"execute": "quit"}) + "\n", timeout=30)


@pytest.fixture
def qemu() -> Iterator[StockQemu]:
    requires("qemu")
    stock = StockQemu()
    yield stock
    stock.close()


def read_body(section: stream.SectionStart | stream.SectionFull, source: ByteSource) -> bytes:
    """A section's body, decoded and written again by us."""
    if section.idstr != "ram":
        description = DESCRIPTIONS[section.idstr]
        return encode(description, decode(description, source, section.version_id))
    reader, writer, raw = RamReader(source, BLOCKS), RamWriter(), b""
    while True:
        record = reader.read()
        raw += writer.write(record)
        if isinstance(record, MemSize):
            check_mem_size(record, BLOCKS)
        if isinstance(record, EndOfBody):
            return raw


def rewrite(source: ByteSource) -> tuple[bytes, list[stream.Record]]:
    """A whole stream read and written again; its records without the sections' bodies."""
    out = stream.encode(stream.read_header(source))
    records: list[stream.Record] = []
    table = stream.SectionTable(
        {("ram", 0): (4, 4)}
        | {(name, 0): (each.version, each.version) for name, each in DESCRIPTIONS.items()}
    )
    while not records or not isinstance(records[-1], stream.EndOfStream):
        record = stream.read_record(source)
        records.append(record)
        out += stream.encode(record)
        section: stream.SectionStart | stream.SectionFull
        match record:
            case stream.SectionStart() | stream.SectionFull():
                table.introduce(record)
                section = record
            case stream.SectionPart() | stream.SectionEnd():
                section = table.find(record)
            case _:
                continue
        out += read_body(section, source)
        stream.read_footer(source, section.section_id, section.idstr)
        out += stream.encode(stream.SectionFooter(section.section_id))
    description = stream.read_record(source)
    records.append(description)
    return out + stream.encode(description), records


def test_a_stock_stream_is_read_and_written_again_byte_for_byte(
    qemu: StockQemu, tmp_path: pathlib.Path
) -> None:
    qemu.set_capabilities("events", "validate-uuid")
    raw = qemu.migrate(tmp_path / "stream")
    again, records = rewrite(BytesSource(raw))
    assert again == raw
    assert isinstance(records[-1], stream.VmDescription)
    configuration = records[0]
    assert isinstance(configuration, stream.Configuration)
    assert configuration.machine == "none"
    assert configuration.uuid == uuid.UUID(UUID).bytes
    heads = [record for record in records if isinstance(record, stream.SectionStart | stream.SectionFull)]
    assert [head.idstr for head in heads] == ["ram", "timer", "cpu_common", "cpu", "globalstate"]
    shown = json.loads(next(r.json for r in records if isinstance(r, stream.VmDescription)))
    assert list(shown) == ["page_size", "devices"]
    assert [device["name"] for device in shown["devices"]] == [head.idstr for head in heads[1:]]
    assert list(shown["devices"][0])[:4] == ["name", "instance_id", "vmsd_name", "version"]


def test_a_list_of_capabilities_in_the_configuration(qemu: StockQemu, tmp_path: pathlib.Path) -> None:
    qemu.set_capabilities("events", "x-ignore-shared")
    source = BytesSource(qemu.migrate(tmp_path / "stream"))
    stream.read_header(source)
    record = stream.read_record(source)
    assert record == stream.Configuration("none", capabilities=("x-ignore-shared",))


class SocketSource:
    """A ByteSource over a connection; blocks as long as it must."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self.offset = 0

    def peek(self, n: int) -> bytes:
        while len(self._buffer) < n:
            more = self._connection.recv(65536)
            if not more:
                break
            self._buffer += more
        return self._buffer[:n]

    def read(self, n: int) -> bytes:
        data = self.peek(n)
        if len(data) < n:
            raise StreamTruncated(n, len(data), offset=self.offset)
        self._buffer = self._buffer[n:]
        self.offset += n
        return data


def test_stock_completes_over_a_return_path_of_ours(qemu: StockQemu, tmp_path: pathlib.Path) -> None:
    """Without our SHUT a source with a return path never completes."""
    qemu.set_capabilities("events", "postcopy-ram")
    with qemu.connected(tmp_path / "socket") as connection:
        writer = MessageWriter()
        _, records = rewrite(SocketSource(connection))
        assert records[1:4] == [commands.OpenReturnPath(), commands.Ping(1), commands.PostcopyAdvise()]
        connection.sendall(writer.write(Pong(1)) + writer.write(Shut()))
        qemu.wait_migrated()


def test_every_cut_and_many_corruptions_of_a_stock_stream_are_documented_errors(
    qemu: StockQemu, tmp_path: pathlib.Path
) -> None:
    qemu.set_capabilities("events")
    raw = qemu.migrate(tmp_path / "stream")
    for end in [*range(400), *range(400, len(raw), 97)]:
        with pytest.raises(errors.StreamError):
            rewrite(BytesSource(raw[:end]))
    for at in range(0, len(raw), 61):
        broken = bytearray(raw)
        broken[at] ^= 0x81
        with contextlib.suppress(errors.StreamError, VMStateError):
            rewrite(BytesSource(bytes(broken)))


def test_stock_loads_a_stream_of_ours(tmp_path: pathlib.Path) -> None:
    requires("qemu")
    donor = StockQemu()
    donor.set_capabilities("events")
    raw = donor.migrate(tmp_path / "donor")
    donor.close()
    timer = re.search(rb"\x04\0\0\0.\x05timer", raw, re.DOTALL)
    assert timer is not None
    devices = raw[timer.start() :]
    page = bytes(range(256)) * 16
    writer = RamWriter()
    parts = [
        stream.encode(stream.Header()),
        stream.encode(stream.Configuration("none")),
        stream.encode(stream.SectionStart(2, "ram", 0, 4)),
        writer.write(MemSize((("ram", MIB),))) + writer.write(EndOfBody()),
        stream.encode(stream.SectionFooter(2)),
        stream.encode(stream.SectionEnd(2)),
        writer.write(Page("ram", 0x5000, page)),
        writer.write(ZeroPage("ram", 0x6000)),
        writer.write(ZeroPage("ram", 0x7000, 0xEE)),
        writer.write(Page("ram", 0xFF000, page[::-1])),
        writer.write(EndOfBody()),
        stream.encode(stream.SectionFooter(2)),
        devices,
    ]
    (tmp_path / "ours").write_bytes(b"".join(parts))
    stock = StockQemu("-incoming", "defer")
    stock.set_capabilities("events")
    stock.execute("migrate-incoming", uri=f"exec:cat {tmp_path / 'ours'}")
    stock.wait_migrated()
    memory = tmp_path / "memory"
    stock.execute("pmemsave", val=0, size=MIB, filename=str(memory))
    stock.close()
    expected = bytearray(MIB)
    expected[0x5000:0x6000] = page
    expected[0x7000:0x8000] = b"\xee" * 4096
    expected[0xFF000:] = page[::-1]
    assert memory.read_bytes() == bytes(expected)


QEMUS = 21
"""So many capabilities QEMU 7.2 has; ours come after them."""


def test_capabilities_and_parameters_are_those_of_stock(qemu: StockQemu) -> None:
    assert Capabilities().query()[:QEMUS] == qemu.execute("query-migrate-capabilities")
    ours = Parameters().query()
    for name in ("x-postcopy-start-time", "x-handshake-timeout", "x-peer-timeout", "x-postcopy-spool-path"):
        del ours[name]
    assert ours == qemu.execute("query-migrate-parameters")
    lines = parameters_text(Parameters().query()).splitlines()
    theirs = qemu.execute("human-monitor-command", **{"command-line": "info migrate_parameters"})
    beyond = {"multifd-zlib-level: 1", "multifd-zstd-level: 1", "x-postcopy-start-time: 0 ms"}
    beyond |= {"x-postcopy-spool-path: ''", "x-handshake-timeout: 10000 ms", "x-peer-timeout: 30000 ms"}
    assert [line for line in lines if line not in beyond] == theirs.split("\r\n")[:-1]
    theirs = qemu.execute("human-monitor-command", **{"command-line": "info migrate_capabilities"})
    lines = capabilities_text(Capabilities().query()).splitlines()
    assert lines[:QEMUS] == theirs.split("\r\n")[:-1]


def test_refusals_of_parameters_are_in_stocks_words(qemu: StockQemu) -> None:
    values: dict[str, list[Any]] = {
        "announce-initial": [-1, 100001],
        "announce-rounds": [1001],
        "announce-step": [0, 10001],
        "compress-level": [10, 256],
        "compress-threads": [0, 256],
        "throttle-trigger-threshold": [0, 101],
        "cpu-throttle-initial": [0, 100],
        "max-cpu-throttle": [19, 100],
        "downtime-limit": [-1, 2000001],
        "multifd-channels": [0, 256],
        "multifd-compression": ["x"],
        "xbzrle-cache-size": [4095, 5000],
        "max-bandwidth": ["x"],
        "x-checkpoint-delay": [2**32],
        "block-incremental": [1],
        "tls-hostname": [1],
    }
    for name, bad in values.items():
        for value in bad:
            with pytest.raises(errors.ParameterRefused) as caught:
                Parameters().set({name: value})
            assert str(caught.value) == qemu.refusal("migrate-set-parameters", **{name: value})


def test_refusals_of_capabilities_are_in_stocks_words(qemu: StockQemu) -> None:
    for first in (Capability.BACKGROUND_SNAPSHOT, Capability.POSTCOPY_PREEMPT, Capability.MULTIFD):
        for second in tuple(Capability)[:QEMUS]:
            both = [{"capability": each.value, "state": True} for each in {first, second}]
            theirs = qemu.refusal("migrate-set-capabilities", capabilities=both)
            off = [{**each, "state": False} for each in both]
            qemu.execute("migrate-set-capabilities", capabilities=off)
            if not theirs:
                continue
            with pytest.raises(errors.ParameterRefused) as caught:
                Capabilities().set(both)
            assert str(caught.value) == theirs


@pytest.mark.parametrize(
    "uri",
    ["", "zzz:1", "tcp", "tcp:127.0.0.1", "tcp:", "tcp::", "tcp:[::1:44", "tcp:h:1,ipv4=x", "unix:", "fd:"],
)
def test_refusals_of_uris_are_in_stocks_words(qemu: StockQemu, uri: str) -> None:
    with pytest.raises(errors.MigrationRefused) as caught:
        parse_uri(uri, Role.SOURCE)
    assert str(caught.value) == qemu.refusal("migrate", uri=uri)
