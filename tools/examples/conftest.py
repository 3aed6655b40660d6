"""pytest fixtures for your own tests: copy this file beside them, or name it in `pytest_plugins`.

    async def test_my_orchestrator(start_vm):
        source = await start_vm("-kernel", "guest.elf")
        target = await start_vm("-kernel", "guest.elf", "-incoming", "defer")
        await source.qmp.execute("migrate", ...)

Each VM is a process of its own with a QMP socket in the test's temporary folder; when the test is over it has
ended, whatever happened, and a VM that wrote a traceback or hung fails the test. Needs pytest, pytest-asyncio
and qemu.qmp. The command is `pageferry`, or what the environment variable PAGEFERRY says.
"""

import asyncio
import contextlib
import os
import pathlib
import shlex
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest_asyncio
from qemu.qmp import ConnectError, QMPClient, QMPError

START_S = 15.0
QUIT_S = 10.0


@dataclass
class Vm:
    """One VM: `qmp` is a connected qemu.qmp client, `folder` is its own."""

    process: asyncio.subprocess.Process
    qmp: QMPClient
    folder: pathlib.Path

    @property
    def console(self) -> str:
        """What the guest wrote to its serial port."""
        return (self.folder / "serial").read_text(encoding="latin-1")

    @property
    def messages(self) -> str:
        """What the VM process wrote to its standard error."""
        return (self.folder / "stderr").read_text()


StartVm = Callable[..., Awaitable[Vm]]


@pytest_asyncio.fixture
async def start_vm() -> AsyncIterator[StartVm]:
    """Starts VMs: `await start_vm(*options)`."""
    vms: list[Vm] = []
    # A short path: a socket's name has at most 107 bytes, and pytest's tmp_path can be longer.
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:

        async def start(*options: str) -> Vm:
            vms.append(vm := await _start(pathlib.Path(folder) / str(len(vms)), options))
            return vm

        yield start
        complaints = [complaint for vm in vms if (complaint := await _end(vm))]
    assert not complaints, "\n".join(complaints)


async def _start(folder: pathlib.Path, options: tuple[str, ...]) -> Vm:
    folder.mkdir()
    command = shlex.split(os.environ.get("PAGEFERRY", "pageferry"))
    fixed = ["-display", "none", "-nodefaults", "-serial", f"file:{folder / 'serial'}"]
    fixed += ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
    with open(folder / "stderr", "wb") as stderr:
        process = await asyncio.create_subprocess_exec(*command, *fixed, *options, stderr=stderr)
    vm = Vm(process, QMPClient(folder.name), folder)
    try:
        async with asyncio.timeout(START_S):
            while True:
                if process.returncode is not None:
                    raise RuntimeError(f"the VM did not start: {vm.messages}")
                with contextlib.suppress(ConnectError):
                    await vm.qmp.connect(str(folder / "qmp"))
                    return vm
                await asyncio.sleep(0.01)
    except BaseException:
        await _end(vm)
        raise


async def _end(vm: Vm) -> str:
    """Quit; gives what is wrong with how it ended."""
    with contextlib.suppress(QMPError, EOFError):
        await vm.qmp.execute("quit")
    with contextlib.suppress(QMPError, EOFError):
        await vm.qmp.disconnect()
    try:
        await asyncio.wait_for(vm.process.wait(), QUIT_S)
    except TimeoutError:
        vm.process.kill()
        await vm.process.wait()
        return f"a VM did not quit:\n{vm.messages}"
    return f"a VM failed:\n{vm.messages}" if "Traceback" in vm.messages else ""
