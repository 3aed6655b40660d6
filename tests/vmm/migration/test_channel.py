"""Channels: each transport as source and as destination, what is refused, and nothing half done stays."""

from __future__ import annotations

import os
import pathlib
import socket
import threading
import time

import pytest

from vmm.errors import MigrationError
from vmm.migration import channel as channels
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled
from vmm.migration.status import Role
from vmm.migration.uri import parse_uri

PAYLOAD = b"not a migration stream" + os.urandom(300_000)


def no_fd(name: str) -> int:
    raise MigrationError(f"no descriptor {name}")


def transfer(source: channels.Channel, incoming: channels.Incoming, cancel: CancelEvent) -> bytes:
    def send() -> None:
        writer = StreamWriter(source.write_fd, cancel.fd)
        writer.write(PAYLOAD)
        writer.flush()
        source.finish()
        source.close()

    thread = threading.Thread(target=send)
    thread.start()
    destination = incoming.accept(cancel.fd)
    assert destination.two_way
    assert not os.get_inheritable(destination.read_fd)
    assert not os.get_blocking(destination.read_fd)
    data = StreamReader(destination.read_fd, cancel.fd).read(len(PAYLOAD))
    thread.join()
    destination.finish()
    destination.close()
    return data


@pytest.mark.parametrize("uri", ["unix:{tmp}/s", "tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0"])
def test_sockets(uri: str, tmp_path: pathlib.Path) -> None:
    cancel = CancelEvent()
    try:
        incoming = channels.listen(parse_uri(uri.format(tmp=tmp_path), Role.DESTINATION), no_fd)
    except OSError as error:
        pytest.skip(f"{uri} cannot be had here: {error}")
    assert incoming.address is not None
    if uri.startswith("unix"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        target = uri.format(tmp=tmp_path)
    else:
        target = uri.removesuffix("0") + str(incoming.address["port"])
    source = channels.connect(parse_uri(target, Role.SOURCE), no_fd, cancel.fd)
    assert source.two_way
    assert not os.get_inheritable(source.read_fd)
    assert not os.get_blocking(source.read_fd)
    assert transfer(source, incoming, cancel) == PAYLOAD
    incoming.close()
    assert list(tmp_path.iterdir()) == []


def test_exec_both_ways(tmp_path: pathlib.Path) -> None:
    cancel = CancelEvent()
    path = tmp_path / "out"
    source = channels.connect(parse_uri(f"exec:cat > {path}", Role.SOURCE), no_fd, cancel.fd)
    assert not source.two_way
    writer = StreamWriter(source.write_fd, cancel.fd)
    writer.write(PAYLOAD)
    writer.flush()
    source.finish()
    assert path.read_bytes() == PAYLOAD
    incoming = channels.listen(parse_uri(f"exec:cat {path}", Role.DESTINATION), no_fd)
    destination = incoming.accept(cancel.fd)
    assert StreamReader(destination.read_fd, cancel.fd).read(len(PAYLOAD)) == PAYLOAD
    destination.finish()


def test_a_failing_command_is_an_error() -> None:
    channel = channels.connect(parse_uri("exec:cat > /dev/null; exit 3", Role.SOURCE), no_fd, -1)
    with pytest.raises(MigrationError, match="ended with status 3"):
        channel.finish()


def test_a_file_appears_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    cancel = CancelEvent()
    uri = parse_uri(f"file:{tmp_path}/state", Role.SOURCE)
    given_up = channels.connect(uri, no_fd, cancel.fd)
    os.write(given_up.write_fd, b"half")
    assert not (tmp_path / "state").exists()
    given_up.abort()
    given_up.close()
    assert list(tmp_path.iterdir()) == []
    source = channels.connect(uri, no_fd, cancel.fd)
    os.write(source.write_fd, PAYLOAD)
    source.finish()
    assert [p.name for p in tmp_path.iterdir()] == [f"state.part-{os.getpid()}"]
    source.publish()
    source.close()
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    destination = channels.listen(uri, no_fd).accept(cancel.fd)
    assert StreamReader(destination.read_fd, cancel.fd).read(len(PAYLOAD)) == PAYLOAD
    destination.close()


def test_a_file_with_an_offset_is_written_in_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"header..")
    uri = parse_uri(f"file:{path},offset=8", Role.SOURCE)
    source = channels.connect(uri, no_fd, -1)
    os.write(source.write_fd, b"stream")
    source.finish()
    source.close()
    assert path.read_bytes() == b"header..stream"
    destination = channels.listen(uri, no_fd).accept(-1)
    assert os.read(destination.read_fd, 100) == b"stream"
    destination.close()


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path: pathlib.Path) -> None:
    # `migrate file:/dev/null`, as root, made a file of the device.
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to("fifo")
    uri = parse_uri(f"file:{link}", Role.SOURCE)
    with pytest.raises(OSError, match="No such device or address"):
        channels.connect(uri, no_fd, -1)  # nobody reads it; waiting would keep QMP
    destination = channels.listen(uri, no_fd).accept(-1)
    source = channels.connect(uri, no_fd, -1)
    os.write(source.write_fd, b"stream")
    assert os.read(destination.read_fd, 100) == b"stream"
    source.finish()
    source.close()
    destination.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link"]
    assert fifo.is_fifo()
    null = channels.connect(parse_uri("file:/dev/null", Role.SOURCE), no_fd, -1)
    assert os.write(null.write_fd, PAYLOAD) == len(PAYLOAD)
    null.finish()
    null.close()
    assert pathlib.Path("/dev/null").is_char_device()
    open_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Illegal seek"):
        channels.listen(parse_uri(f"file:{fifo},offset=8", Role.DESTINATION), no_fd)
    assert len(os.listdir("/proc/self/fd")) == open_fds


def test_a_link_to_a_file_stays_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to("state")
    source = channels.connect(parse_uri(f"file:{tmp_path}/link", Role.SOURCE), no_fd, -1)
    os.write(source.write_fd, b"stream")
    source.finish()
    source.publish()
    source.close()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "state").read_bytes() == b"stream"


def test_fd_is_two_way_if_it_is_a_socket() -> None:
    left, right = socket.socketpair()
    uri = parse_uri("fd:name", Role.SOURCE)
    channel = channels.connect(uri, lambda name: {"name": left.detach()}[name], -1)
    assert channel.two_way
    channel.shutdown()
    assert right.recv(1) == b""
    channel.close()
    right.close()
    read_fd, write_fd = os.pipe()
    channel = channels.connect(uri, lambda _: write_fd, -1)
    assert not channel.two_way
    channel.close()
    os.close(read_fd)


def test_nobody_and_nothing_there(tmp_path: pathlib.Path) -> None:
    cancel = CancelEvent()
    with pytest.raises(
        ConnectionRefusedError, match=r"Failed to connect to '127.0.0.1:1': Connection refused"
    ):
        channels.connect(parse_uri("tcp:127.0.0.1:1", Role.SOURCE), no_fd, cancel.fd)
    with pytest.raises(MigrationError, match="address resolution failed"):
        channels.connect(parse_uri("tcp:no.such.host.invalid:1", Role.SOURCE), no_fd, cancel.fd)
    with pytest.raises(MigrationError, match="address resolution failed"):
        channels.listen(parse_uri(f"tcp:{'a' * 64}:1", Role.DESTINATION), no_fd)
    with pytest.raises(FileNotFoundError):
        channels.listen(parse_uri(f"file:{tmp_path}/absent", Role.DESTINATION), no_fd)
    with pytest.raises(OSError, match="Failed to bind socket to"):
        channels.listen(parse_uri("tcp:192.0.2.1:1", Role.DESTINATION), no_fd)


def test_every_wait_can_be_cancelled(tmp_path: pathlib.Path) -> None:
    cancel = CancelEvent()
    incoming = channels.listen(parse_uri(f"unix:{tmp_path}/s", Role.DESTINATION), no_fd)
    threading.Timer(0.05, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        incoming.accept(cancel.fd)
    left, right = socket.socketpair()
    left.setblocking(False)
    with pytest.raises(Cancelled):
        StreamReader(left.fileno(), cancel.fd).read(1)
    writer = StreamWriter(left.fileno(), cancel.fd)
    with pytest.raises(Cancelled):
        writer.write(PAYLOAD * 20)  # more than any socket buffer
    assert time.monotonic() - started < 5
    left.close()
    right.close()
    incoming.close()
