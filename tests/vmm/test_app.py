"""The whole program as a process: coming up, monitors, the serial port, every way to end, and bad input."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.support.assemble import assemble
from tests.support.unix_client import connected
from vmm import cli

DEADLINE_S = 60.0
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

ECHO = """
mov $0x3fd, %dx
1: in (%dx), %al; test $1, %al; jz 1b
mov $0x3f8, %dx; in (%dx), %al
cmp $'q', %al; je 2f
out %al, (%dx)
mov $0x3fd, %dx; jmp 1b
2: mov $3, %al; out %al, $0xf4
mov $'!', %al; out %al, (%dx)
3: jmp 3b
"""
HANG = "1: jmp 1b"


class Process:
    """A VM process."""

    def __init__(
        self,
        *options: str,
        stdin: int = subprocess.DEVNULL,
        program: Sequence[str] = ("-m", "vmm"),
        **more: Any,
    ) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *program, "-M", "none", "-m", "1", "-display", "none", *options],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            **more,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr, once it has ended."""
        out, err = self.popen.communicate(timeout=DEADLINE_S)
        return self.popen.returncode, out.decode(), err.decode()

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()


class Qmp:
    """A client, by hand: what is tested here is the process, not the protocol."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_S)
        self.sock = sock
        self._lines = sock.makefile("rb")
        self.greeting = self.read()
        self.events: list[dict[str, Any]] = []
        self("qmp_capabilities")

    @classmethod
    def connect(cls, path: pathlib.Path) -> Qmp:
        return cls(connected(path, DEADLINE_S))

    def read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._lines.readline() or b'{"eof": true}')
        return message

    def __call__(self, command: str, **arguments: Any) -> Any:
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (message := self.read()):
            self.events.append(message)
        assert "return" in message, message
        return message["return"]

    def event(self, name: str) -> dict[str, Any]:
        while True:
            for event in self.events:
                if event["event"] == name:
                    return event
            self.events.append(self.read())

    def close(self) -> None:
        self._lines.close()
        self.sock.close()


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[Process] = []

    def start_process(*options: str, **more: Any) -> Process:
        processes.append(Process(*options, **more))
        return processes[-1]

    yield start_process
    for process in processes:
        process.kill()


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Callable[[str], list[str]]:
    def make_disk(code: str) -> list[str]:
        path = tmp_path / "disk"
        path.write_bytes(assemble(code, 0x7C00, 16).ljust(510, b"\0") + b"\x55\xaa")
        return ["-drive", f"file={path},format=raw", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]

    return make_disk


Disk = Callable[[str], list[str]]


def read_until(stream: Any, text: bytes) -> bytes:
    got = b""
    while text not in got:
        assert select.select([stream], [], [], DEADLINE_S)[0], got
        got += os.read(stream.fileno(), 4096)
    return got


def test_an_echo_over_stdio(start: Start, disk: Disk) -> None:
    process = start(*disk(ECHO), "-serial", "stdio", stdin=subprocess.PIPE)
    assert process.popen.stdin is not None
    process.popen.stdin.write(b"hello")
    process.popen.stdin.flush()
    assert read_until(process.popen.stdout, b"hello") == b"hello"
    process.popen.stdin.write(b" again and again and again" * 40 + b"q")
    process.popen.stdin.flush()
    status, out, err = process.end()
    assert status == 3 << 1 | 1
    assert out == " again and again and again" * 40
    assert err == ""


@pytest.mark.parametrize("end", [b"\x03", b"q"])
def test_on_a_terminal(disk: Disk, end: bytes) -> None:
    """Keys go to the guest as they are typed, Ctrl-C ends the VM, and the terminal is as it was."""
    outer, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    take_it = (
        "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    vm = [sys.executable, "-m", "vmm", "-m", "1", *disk(ECHO), "-display", "none", "-serial", "stdio"]
    process = subprocess.Popen(
        [sys.executable, "-c", take_it, *vm],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        with os.fdopen(os.dup(outer), "rb", 0) as screen:
            end_s = time.monotonic() + DEADLINE_S
            while termios.tcgetattr(inner)[3] & termios.ICANON:
                assert time.monotonic() < end_s
                time.sleep(0.002)
            os.write(outer, b"ab")
            assert read_until(screen, b"ab") == b"ab"
            os.write(outer, end)
            assert process.wait(DEADLINE_S) == (7 if end == b"q" else 0)
        assert termios.tcgetattr(inner) == before
    finally:
        process.kill()
        process.wait()
        os.close(outer)
        os.close(inner)


def test_a_monitor_from_the_greeting_to_the_end(start: Start, disk: Disk, tmp_path: pathlib.Path) -> None:
    path, pidfile = tmp_path / "qmp", tmp_path / "pid"
    process = start(
        *disk(HANG), "-qmp", f"unix:{path},server=on,wait=off", "-pidfile", str(pidfile), "-name", "guest=n"
    )
    qmp = Qmp.connect(path)
    assert int(pidfile.read_text()) == process.popen.pid
    assert qmp.greeting["QMP"]["version"]["qemu"]["major"] == 7
    assert qmp("query-status")["status"] == "running"
    assert qmp("query-name") == {"name": "n"}
    assert len(qmp("query-cpus-fast")) == 1
    assert [chardev["label"] for chardev in qmp("query-chardev")] == ["compat_monitor0"]
    qmp("stop")
    qmp("cont")
    assert [event["event"] for event in qmp.events if event["event"] != "RESUME"] == ["STOP"]
    assert qmp("quit") == {}
    assert qmp.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert qmp.read() == {"eof": True}
    qmp.close()
    assert process.end() == (0, "", "")
    assert not path.exists()
    assert not pidfile.exists()


def test_what_happens_last_is_told_before_the_end(start: Start, tmp_path: pathlib.Path) -> None:
    """Events soon after others wait for the loop's next look, and the end may come first."""
    patient = (
        "import runpy; from vmm.control import wiring; wiring.BUNCH_S = 3600.0;"
        "runpy.run_module('vmm', run_name='__main__')"
    )
    process = start(
        "-qmp", f"unix:{tmp_path / 'q'},server,nowait", "-incoming", "defer", program=("-c", patient)
    )
    qmp = Qmp.connect(tmp_path / "q")
    qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    qmp("migrate-incoming", uri=f"unix:{tmp_path / 'm'}", **{"exit-on-error": True})
    with connected(tmp_path / "m", DEADLINE_S) as source:
        source.sendall(b"no stream" * 100)
        while not (message := qmp.read()).get("eof"):
            qmp.events.append(message)
    qmp.close()
    assert process.end()[0] == 1
    seen = [event["data"]["status"] for event in qmp.events if event["event"] == "MIGRATION"]
    assert seen == ["setup", "active", "failed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(start: Start, tmp_path: pathlib.Path, number: int) -> None:
    process = start("-qmp", f"unix:{tmp_path / 'q'},server=on,wait=off")
    qmp = Qmp.connect(tmp_path / "q")
    process.popen.send_signal(number)
    assert qmp.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-signal"}
    qmp.close()
    assert process.end()[0] == 0
    assert not (tmp_path / "q").exists()


def test_several_monitors_one_of_which_connects_out(start: Start, tmp_path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "out"))
        listener.listen(1)
        listener.settimeout(DEADLINE_S)
        process = start(
            *("-chardev", f"socket,id=mon,path={tmp_path / 'out'}", "-mon", "chardev=mon,mode=control"),
            *("-qmp", f"unix:{tmp_path / 'q'},server,nowait", "-qmp", "stdio", "-S"),
            stdin=subprocess.PIPE,
        )
        out = Qmp(listener.accept()[0])
    third = Qmp.connect(tmp_path / "q")
    assert third("query-status")["status"] == out("query-status")["status"] == "prelaunch"
    stdio = process.popen
    assert stdio.stdin is not None
    stdio.stdin.write(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
    stdio.stdin.flush()
    assert out.event("SHUTDOWN")["data"]["reason"] == "host-qmp-quit"
    out.close()
    third.close()
    status, text, err = process.end()
    assert (status, err) == (0, "")
    assert text.count("\r\n") == 4  # greeting, {}, SHUTDOWN, {}


def test_daemonize_returns_once_the_socket_listens(disk: Disk, tmp_path: pathlib.Path) -> None:
    path, pidfile = tmp_path / "q", tmp_path / "pid"
    command = [sys.executable, "-m", "vmm", "-m", "1", *disk(HANG), "-daemonize", "-pidfile", str(pidfile)]
    command += ["-qmp", f"unix:{path},server=on,wait=off", "-serial", f"file:{tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, timeout=DEADLINE_S, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    qmp = Qmp(sock)
    assert os.getsid(int(pidfile.read_text())) != os.getsid(0)
    qmp("quit")
    assert qmp.read() == {"eof": True}
    qmp.close()
    again = [*command[:-2], "-kernel", "/nonexistent"]
    done = subprocess.run(again, cwd=ROOT, timeout=DEADLINE_S, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"pageferry: ")


def test_wait_for_a_client(start: Start, disk: Disk, tmp_path: pathlib.Path) -> None:
    process = start(*disk(ECHO), "-serial", f"unix:{tmp_path / 's'},server=on")
    end_s = time.monotonic() + DEADLINE_S
    while not (tmp_path / "s").exists():
        assert time.monotonic() < end_s
        time.sleep(0.002)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(tmp_path / "s"))
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        sock.sendall(b"q")
        assert process.end()[0] == 7


def test_a_signal_ends_the_wait_for_a_client(start: Start, tmp_path: pathlib.Path) -> None:
    process = start("-qmp", f"unix:{tmp_path / 'q'},server=on")
    end_s = time.monotonic() + DEADLINE_S
    while not (tmp_path / "q").exists():
        assert time.monotonic() < end_s
        time.sleep(0.002)
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == (0, "", "")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["-kernel", "/nonexistent"],
            "pageferry: Could not open '/nonexistent': No such file or directory\n",
        ),
        (["-kernel", "/etc/passwd"], "pageferry: /etc/passwd: Not an ELF file"),
        (["-qmp", "unix:/nonexistent/q,server=on"], "-qmp unix:/nonexistent/q,server=on: Failed to bind"),
        (["-qmp", "unix:/nonexistent/q"], "-qmp unix:/nonexistent/q: Failed to connect"),
        (["-serial", "file:/nonexistent/q"], "-serial file:/nonexistent/q: Could not open"),
        (["-serial", "tcp:no.such.host.invalid:1"], "pageferry: -serial tcp:no.such.host.invalid:1: "),
        (["-pidfile", "/nonexistent/p"], "-pidfile /nonexistent/p: Cannot create PID file"),
        (["-D", "/nonexistent/l"], "-D: Could not open '/nonexistent/l'"),
        (["-incoming", "unix:/nonexistent/m"], "-incoming unix:/nonexistent/m: "),
        (["-incoming", "tcp:nowhere"], "-incoming tcp:nowhere: "),
        (["-global", "migration.foo=3"], "-global migration.foo=3: "),
        (["-device", "pvpanic,ioport=0x3f8"], "pvpanic cannot have port 0x3f8: isa-serial has it"),
    ],
)
def test_what_is_wrong_is_one_line(start: Start, options: list[str], message: str) -> None:
    status, out, err = start(*options).end()
    assert status == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_logs(start: Start, disk: Disk, tmp_path: pathlib.Path) -> None:
    process = start(
        *disk("out %al, $0x80; out %al, $0xf4\n1: jmp 1b"),
        *(
            "-d",
            "machine,unimp",
            "-D",
            str(tmp_path / "log"),
            "-name",
            "g",
            "-msg",
            "timestamp=on,guest-name=on",
        ),
        *("-global", "absent.x=1"),
    )
    assert process.end()[0] & 1
    log = (tmp_path / "log").read_text()
    assert "Z g pageferry: run state prelaunch -> running\n" in log
    assert "port 0x80 written, no device has it" in log
    assert "warning: -global absent.x=1: ignored" in log


# ---- in this process: what needs no machine ----


def test_help_and_errors_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-version"]) == 0
    assert capsys.readouterr().out.startswith("QEMU emulator version 7.2.22 (pageferry-0.1.0)\n")
    assert cli.main(["-foo"]) == 1
    assert capsys.readouterr().err.startswith("pageferry: -foo: Invalid option")
