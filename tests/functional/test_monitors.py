"""Monitors of every kind at one real process, and a terminal that is given back whatever ends it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.harness import guest_options
from tests.support.requires import requires
from tests.support.unix_client import connected
from tools.vm_process import ROOT

DEADLINE_S = 60.0
OURS = [sys.executable, "-m", "vmm"]
STOCK = ["qemu-system-x86_64"]


class Line:
    """One QMP connection, by hand."""

    def __init__(self, sock: socket.socket, *, negotiate: bool = True) -> None:
        sock.settimeout(DEADLINE_S)
        self.socket = sock
        self._file = sock.makefile("rb")
        self.greeting = json.loads(self._file.readline())
        if negotiate:
            assert self.call("qmp_capabilities") == {"return": {}}

    @classmethod
    def open(cls, path: Path) -> Line:
        return cls(connected(path, DEADLINE_S))

    def call(self, command: str, passed: int | None = None, **arguments: Any) -> Any:
        """The reply; the descriptor `passed` goes with the command."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        data = json.dumps({"execute": command, "arguments": names}).encode()
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed]))] if passed is not None else []
        )
        self.socket.sendmsg([data], rights)
        return self.next()

    def next(self) -> Any:
        """The next object, or None at the end."""
        line = self._file.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextlib.contextmanager
def process(command: list[str], *options: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [*command, "-M", "none", "-nodefaults", "-display", "none", "-S", *options], env=environment, **how
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    sock.settimeout(DEADLINE_S)
    return sock


def tcp_listener() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.settimeout(DEADLINE_S)
    return sock


def many_monitors(folder: Path, port: int, listening_fd: int, connected_fd: int) -> list[str]:
    """Options: a monitor of each kind; the last arguments are what it connects to or inherits."""
    return [
        *("-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"),
        *("-qmp", f"unix:{folder / 'shared'},server,nowait,x-exclusive=off"),
        *("-qmp-pretty", f"unix:{folder / 'pretty'},server=on,wait=off"),
        *("-qmp", f"unix:{folder / 'front'}"),
        *("-chardev", f"socket,id=out,host=127.0.0.1,port={port}"),
        *("-mon", "chardev=out,mode=control"),
        *("-chardev", f"socket,id=listening,fd={listening_fd},server=on,wait=off"),
        *("-mon", "chardev=listening,mode=control"),
        *("-chardev", f"socket,id=connected,fd={connected_fd}", "-mon", "connected,mode=control"),
        *("-qmp", "tcp::0,server=on,wait=off"),
        *("-monitor", f"unix:{folder / 'human'},server=on,wait=off"),
    ]


@pytest.mark.slow
def test_many_monitors(tmp_path: Path) -> None:
    """Listening, connecting out, inherited, pretty, shared, human: at once, each with all events."""
    front, inherited = listener(tmp_path / "front"), listener(tmp_path / "inherited")
    tcp_front = tcp_listener()
    ours, theirs = socket.socketpair()
    fds = (inherited.fileno(), theirs.fileno())
    options = many_monitors(tmp_path, tcp_front.getsockname()[1], *fds)
    with process(OURS, *options, pass_fds=fds) as running:
        theirs.close()
        lines = [Line(front.accept()[0]), Line(tcp_front.accept()[0]), Line(ours)]
        lines += [Line.open(tmp_path / name) for name in ("qmp", "shared", "shared", "shared", "inherited")]
        assert all(line.greeting["QMP"]["capabilities"] == ["oob"] for line in lines)
        check_listeners_are_private(running.pid, tmp_path)
        with connected(tmp_path / "pretty", DEADLINE_S) as pretty:
            assert pretty.recv(65536).startswith(b'{\n    "QMP": {\n        "version": {\n')
        with connected(tmp_path / "human", DEADLINE_S) as human:
            check_human(human)
            check_lines(lines)
            human.sendall(b"quit\n")
            for line in lines:
                assert line.next()["event"] == "SHUTDOWN"
                assert line.next() is None
                line.close()
            assert running.wait(DEADLINE_S) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front", "inherited"]
    for sock in (front, inherited, tcp_front):
        sock.close()


def check_listeners_are_private(pid: int, folder: Path) -> None:
    for name in ("qmp", "shared", "pretty", "human"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert {address for address, _ in tcp_listeners(pid)} == {"0100007F"}


def check_human(human: socket.socket) -> None:
    """It knows its own place, and lets the guest run."""
    human.sendall(b"info chardev\ncont\n")
    shown = b""
    while shown.count(b"(qemu) ") < 3:
        shown += human.recv(65536)
    assert b"compat_monitor1: filename=unix:" in shown


def check_lines(lines: list[Line]) -> None:
    """All hear that the guest runs, and share the sets of descriptors."""
    for line in lines:
        assert line.next()["event"] == "RESUME"
        assert line.call("query-status")["return"]["running"] is True
    assert lines[0].call("add-fd", 2, opaque="x")["return"]["fdset-id"] == 0
    assert lines[-1].call("query-fdsets")["return"][0]["fds"][0]["opaque"] == "x"


def tcp_listeners(pid: int) -> list[tuple[str, int]]:
    """Addresses, in the kernel's hexadecimal, and ports on which a process listens."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(os.readlink(fd))
    found = []
    for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        columns = row.split()
        if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
            address, port = columns[1].split(":")
            found.append((address, int(port, 16)))
    return found


FD_CALLS: list[tuple[str, bool, dict[str, Any]]] = [
    ("query-fdsets", False, {}),
    ("add-fd", False, {}),
    ("add-fd", True, {}),
    ("add-fd", True, {"opaque": "x"}),
    ("add-fd", True, {"fdset_id": 0, "opaque": "rdwr:/a"}),
    ("add-fd", True, {"fdset_id": 7}),
    ("add-fd", True, {"fdset_id": -1}),
    ("add-fd", True, {"fdset_id": "a"}),
    ("add-fd", False, {}),
    ("add-fd", False, {}),
    ("query-fdsets", False, {}),
    ("remove-fd", False, {"fdset_id": 9}),
    ("remove-fd", False, {"fdset_id": 0, "fd": 9999}),
    ("remove-fd", False, {"fdset_id": 7}),
    ("remove-fd", False, {}),
    ("getfd", True, {"fdname": "1a"}),
    ("getfd", False, {"fdname": "a"}),
    ("getfd", True, {"fdname": "a"}),
    ("closefd", False, {"fdname": "a"}),
    ("closefd", False, {"fdname": "a"}),
]


def without_numbers(reply: Any) -> Any:
    """A reply with every descriptor's number taken out: it depends on what else is open."""
    if isinstance(reply, dict):
        return {key: without_numbers(value) for key, value in reply.items() if key != "fd"}
    return [without_numbers(value) for value in reply] if isinstance(reply, list) else reply


@pytest.mark.slow
def test_descriptors_are_treated_as_by_stock(tmp_path: Path) -> None:
    requires("qemu")
    replies = {}
    for name, command in (("ours", OURS), ("stock", STOCK)):
        with process(command, "-qmp", f"unix:{tmp_path / name},server=on,wait=off"):
            line = Line.open(tmp_path / name)
            with open("/dev/null") as null:
                replies[name] = [
                    without_numbers(line.call(call, null.fileno() if passes else None, **arguments))
                    for call, passes, arguments in FD_CALLS
                ]
            line.close()
    # Stock forgets a removed descriptor only when its guest runs or is reset, so no listing after remove-fd.
    assert replies["ours"] == replies["stock"]


class Console:
    """A process on a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.terminal, inner = pty.openpty()
        self.before = termios.tcgetattr(inner)
        self.shown = b""
        self._inner = inner
        self.process = subprocess.Popen(
            [*OURS, "-display", "none", *options],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )

    def type(self, data: bytes) -> None:
        os.write(self.terminal, data)

    def wait_for(self, text: bytes) -> None:
        """Until the terminal shows it."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))[0], self.shown
            self.shown += os.read(self.terminal, 65536)

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self._inner)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)
        os.close(self._inner)


@pytest.fixture
def consoles() -> Iterator[list[Console]]:
    opened: list[Console] = []
    yield opened
    for console in opened:
        console.close()


def ends(console: Console) -> int:
    """The exit status; the terminal has to be as it was."""
    status = console.process.wait(DEADLINE_S)
    assert console.modes() == console.before
    return status


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ctrl-a x", "quit", "SIGTERM", "SIGINT", "SIGHUP", "crash"])
def test_nographic_gives_the_terminal_back(consoles: list[Console], way: str) -> None:
    console = Console("-nographic", *guest_options("dirtier", "end=0x110000"))
    consoles.append(console)
    console.wait_for(b"A")  # the guest's
    assert console.modes() != console.before
    console.type(b"\x01h")
    console.wait_for(b"C-a x    exit emulator")
    if way == "ctrl-a x":
        console.type(b"\x01x")
        console.wait_for(b"QEMU: Terminated\r\n\r")
    elif way == "quit":
        console.type(b"\x01c")
        console.wait_for(b"(qemu) ")
        console.type(b"info status\rquit\r")
        console.wait_for(b"VM status: running")
    elif way == "crash":
        console.process.send_signal(signal.SIGTERM)
        console.process.send_signal(signal.SIGTERM)  # the impatient end, without any tidying up
    else:
        console.process.send_signal(getattr(signal, way))
    assert ends(console) == 0


@pytest.mark.slow
def test_a_failed_start_gives_the_terminal_back(consoles: list[Console]) -> None:
    console = Console("-serial", "stdio", "-qmp", "unix:/nonexistent/qmp,server=on,wait=off")
    consoles.append(console)
    assert ends(console) == 1
    console.wait_for(b"No such file or directory")


@pytest.mark.slow
def test_the_terminal_is_taken_back_after_a_stop(consoles: list[Console]) -> None:
    console = Console("-monitor", "stdio", "-M", "none")
    consoles.append(console)
    console.wait_for(b"(qemu) ")
    raw = console.modes()
    # What a shell does between a stop and `fg`.
    console.process.send_signal(signal.SIGSTOP)
    termios.tcsetattr(console._inner, termios.TCSANOW, console.before)
    console.process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + DEADLINE_S
    while console.modes() != raw and time.monotonic() < deadline:
        time.sleep(0.005)
    assert console.modes() == raw
    console.type(b"quit\r")
    assert ends(console) == 0
