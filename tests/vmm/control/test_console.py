"""The human monitor on a backend: greeting, one line at a time, focus, and the same screen as stock's."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.requires import requires
from tests.vmm.control.fakes import FakeVm, make_vm
from tests.vmm.control.screen import rendered
from vmm.control.console import HumanConsole
from vmm.control.vocabulary import BANNER

pytestmark = pytest.mark.asyncio


class FakeBackend:
    """Takes as much as `room` says."""

    def __init__(self) -> None:
        self.room = 1 << 30
        self.shown = ""
        self.asked_for_input = 0

    def write_nowait(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.shown += taken.decode("utf-8", "surrogateescape")
        return len(taken)

    def accept_input(self) -> None:
        self.asked_for_input += 1


class Terminal:
    """A console over the fakes."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.vm: FakeVm = make_vm(loop)
        self.backend = FakeBackend()
        self.console = HumanConsole(self.vm.control.human, self.backend, BANNER, loop)

    def open(self) -> Terminal:
        self.console.release()
        self.console.opened()
        return self

    def type(self, text: str) -> str:
        """What is shown for it."""
        before = len(self.backend.shown)
        self.console.receive(text.encode("utf-8", "surrogateescape"))
        return self.backend.shown[before:]


async def test_banner_and_prompt() -> None:
    terminal = Terminal().open()
    assert terminal.backend.shown == ("QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ")
    assert rendered(terminal.type("info status\n")) == [
        "info status",
        "VM status: paused (prelaunch)",
        "(qemu) |",
    ]
    terminal.type("half a li")
    terminal.open()
    assert terminal.type("info name\n") == "info name\x1b[K\r\n(qemu) "


async def test_a_line_waits_for_the_output_of_the_one_before() -> None:
    terminal = Terminal().open()
    terminal.backend.room = 100
    terminal.type("help\nc\n")
    assert terminal.vm.machine.run_state == "prelaunch"
    assert terminal.console.can_receive() == 0
    while terminal.vm.machine.run_state == "prelaunch":
        terminal.backend.room = 100
        before = len(terminal.backend.shown)
        terminal.console.backend_writable()
        assert len(terminal.backend.shown) > before
    assert "cont|c  -- resume emulation" in terminal.backend.shown
    assert terminal.console.can_receive() > 0
    assert terminal.backend.asked_for_input > 0


async def test_migrate_waits_for_the_end() -> None:
    terminal = Terminal().open()
    terminal.vm.migrator.info = {"status": "active"}
    assert terminal.type("migrate tcp:h:1\ninfo status\n").endswith("tcp:h:1\x1b[K\r\n")
    assert terminal.console.can_receive() == 0
    await asyncio.sleep(0.12)
    assert not terminal.backend.shown.endswith("(qemu) ")
    terminal.vm.migrator.info = {"status": "completed"}
    async with asyncio.timeout(60):
        while not terminal.backend.shown.endswith("VM status: paused (prelaunch)\r\n(qemu) "):
            await asyncio.sleep(0.01)
    assert terminal.type("migrate -d tcp:h:1\n").endswith("(qemu) ")


async def test_nothing_is_shown_without_the_focus() -> None:
    terminal = Terminal()
    terminal.console.focus(False)
    terminal.open()
    assert terminal.backend.shown == ""
    terminal.console.focus(True)
    assert terminal.backend.shown == BANNER + "(qemu) "
    terminal.type("info")
    terminal.console.focus(False)
    terminal.console.focus(False)
    terminal.console.focus(True)
    assert terminal.backend.shown == BANNER + "(qemu) info\x1b[K\r\n(qemu) "


async def test_completion_knows_arguments() -> None:
    terminal = Terminal().open()
    for typed, becomes in [
        ("info migrate_c\t", "info migrate_capabilities "),
        ("help system_r\t", "help system_reset "),
        ("migrate_set_capability postcopy-r\t", "migrate_set_capability postcopy-ram "),
        ("migrate_set_capability events of\t", "migrate_set_capability events off "),
        ("migrate_set_parameter downtime\t", "migrate_set_parameter downtime-limit "),
        ("stop x\t", "stop x"),
    ]:
        assert rendered(terminal.type(typed)) == [f"{becomes}|"], typed
        terminal.type("\x01" + "\x04" * 60)


class StockMonitor:
    """The human monitor of a stock QEMU without a machine."""

    def __init__(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(60)
            options = f"-M none -nodefaults -display none -S -monitor unix:{path}"
            self._process = subprocess.Popen(["qemu-system-x86_64", *options.split()])
            self._socket, _ = listener.accept()
        self._socket.settimeout(60)
        self.shown = ""

    def type(self, text: str) -> str:
        """What the terminal got after this and a last empty line."""
        before = len(self.shown)
        prompts = self.shown.count("(qemu) ")
        self._socket.sendall(text.encode())
        deadline = time.monotonic() + 20
        while self.shown.count("(qemu) ") < prompts + 1 and time.monotonic() < deadline:
            self.shown += self._socket.recv(65536).decode()
        return self.shown[before:]

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


async def test_the_screen_is_that_of_stock(tmp_path: Path) -> None:
    requires("qemu")
    stock = StockMonitor(tmp_path / "monitor")
    terminal = Terminal()
    try:
        stock.type("")
        terminal.open()
        assert terminal.backend.shown == stock.shown
        for line in [
            "info status\n",
            "\n",
            "nonsense\n",
            "ab\x7fc\n",
            "migrate\n",
            "help stop\n",
            "x\x01y\x05z\n",
            "abc def\x17\x17stop x\n",
            "info nam\t\n",
            "inf\tuuid\n",
            "\x1b[A\x1b[D\x1b[D\x1b[Dq\n",
            "abc\x1b[D\x1b[Dx\x1b[3~\x1b[Cy\n",
            "migrate_set_capability events maybe\n",
        ]:
            assert rendered(terminal.type(line)) == rendered(stock.type(line)), line
    finally:
        stock.close()
