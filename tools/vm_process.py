"""A VM in a process of its own, driven over QMP by the public `qemu.qmp` client: Pageferry or stock QEMU.

The demo, the benchmark and the functional tests all start their machines here. Each process has a folder of
its own below /tmp with its QMP socket (`qmp`), its serial output (`serial`) and its messages (`errors`). It
dies with its parent, whatever happens to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, QMPClient, QMPError

from tools.guest_checks import PAGE_BYTES

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOBODY = 65534
"""User and group id of a process that runs unprivileged."""

START_DEADLINE_S = 60.0
"""How long a process may take until its QMP socket answers: far more than it needs."""
QUIT_DEADLINE_S = 30.0
WAIT_DEADLINE_S = 60.0
"""How long what must come may take where no other time is named: for a machine that is busy, too."""
POLL_S = 0.005
"""Between two looks at a condition of another process that sends no event."""

Message = dict[str, Any]
Predicate = Callable[[Message], bool]

ENDED = frozenset({"completed", "failed", "cancelled"})
"""Migration states that nothing follows by itself."""


class VmError(Exception):
    """A VM process did not do what was asked; the text has what it said itself."""


class EventLog(EventListener):
    """Every event of one VM, kept in order, with a way to wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Message] = []
        self._changed = asyncio.Event()

    async def put(self, event: Any) -> None:
        """Keep one event (called by the client)."""
        self.events.append(dict(event))
        self._changed.set()

    def find(self, name: str, predicate: Predicate | None = None, since: int = 0) -> Message | None:
        """The first event `name` from index `since` on for which `predicate` holds."""
        for event in self.events[since:]:
            if event["event"] == name and (predicate is None or predicate(event)):
                return event
        return None

    async def wait(self, name: str, predicate: Predicate | None = None, since: int = 0) -> Message:
        """Wait until `find` finds something and return it."""
        while True:
            self._changed.clear()
            if (event := self.find(name, predicate, since)) is not None:
                return event
            await self._changed.wait()


class VM:
    """One Pageferry process.

    `options` are command line options; QMP, serial port and display are added. `user` runs it under that
    user and group id. Use as an async context manager, or call `start` and `close`.
    """

    program: Sequence[str] = (sys.executable, "-m", "vmm")
    common_options: Sequence[str] = ("-display", "none", "-nodefaults")

    def __init__(self, name: str, *options: str, user: int | None = None, serial: str = "file") -> None:
        self.name = name
        self.options = options
        self.user = user
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"pageferry-{name}-"))
        self.folder.chmod(0o755 if user is None else 0o777)
        self.serial = serial
        self.events = EventLog()
        self.client = QMPClient(name)
        self.process: subprocess.Popen[bytes] | None = None
        self.last_words = ""
        """All that it wrote to stdout and stderr, kept when it is closed."""

    @property
    def qmp_path(self) -> pathlib.Path:
        """Its QMP socket."""
        return self.folder / "qmp"

    @property
    def pid(self) -> int:
        """Its process id; the process was started."""
        assert self.process is not None
        return self.process.pid

    def command(self) -> list[str]:
        """The whole command line, with what makes the process die with this one."""
        wrapper = ["setpriv", "--pdeathsig", "KILL"]
        if self.user is not None:
            wrapper += [f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
        qmp = ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        serial = ["-serial", f"file:{self.folder / 'serial'}" if self.serial == "file" else self.serial]
        return [*wrapper, "--", *self.program, *self.common_options, *qmp, *serial, *self.options]

    async def start(self, environment: dict[str, str] | None = None) -> None:
        """Start the process and connect to it. Raises VmError with its own words if it does not come up."""
        # With its byte code kept, a machine is there in a third of the time, wherever the user keeps none.
        kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(ROOT / "build" / "pycache")}
        paths = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        variables = {**os.environ, **paths, **kept, **(environment or {})}
        with open(self.folder / "errors", "wb") as errors:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd="/",
                env=variables,
                process_group=0,  # a terminal's Ctrl-C is for who has started it, and who ends it then
            )
        self.client.register_listener(self.events)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await self._connect()
        except (TimeoutError, QMPError) as error:
            raise VmError(f"{self.name}: no QMP greeting: {error!r}\n{self.messages()}") from error

    async def _connect(self) -> None:
        while True:
            if self.exit_code is not None:
                raise VmError(f"{self.name}: exited with {self.exit_code}:\n{self.messages()}")
            if self.qmp_path.exists():
                try:
                    await self.client.connect(str(self.qmp_path))
                    return
                except ConnectError as error:
                    if not isinstance(error.exc, ConnectionRefusedError):  # bound, not yet listening
                        raise
            await asyncio.sleep(POLL_S)

    async def __aenter__(self) -> VM:
        try:
            await self.start()
        except BaseException:
            self.kill()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def exit_code(self) -> int | None:
        """The exit status, None while it runs."""
        return None if self.process is None else self.process.poll()

    async def wait_exit(self, timeout_s: float = QUIT_DEADLINE_S) -> int:
        """Wait for the process to end and return its status. Raises VmError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while (code := self.exit_code) is None:
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise VmError(f"{self.name}: still runs after {timeout_s} s\n{self.messages()}") from error
        await self._hang_up()
        return code

    async def _hang_up(self) -> None:
        """Give the QMP connection back, whatever state it is in; if cancelled, not before that is done."""
        hanging_up = asyncio.ensure_future(self.client.disconnect())
        try:
            await asyncio.wait([hanging_up])  # does not pass a cancellation on
        finally:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await hanging_up

    async def close(self) -> None:
        """Quit, wait for the end, remove the folder. One that hangs is killed: VmError, with its stacks."""
        hung = ""
        try:
            if self.exit_code is None and self.process is not None:
                with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
                    async with asyncio.timeout(QUIT_DEADLINE_S):
                        await self.client.execute("quit")
                try:
                    await self.wait_exit()
                except VmError:
                    hung = await self._abort()
        finally:
            try:
                await self._hang_up()
            finally:
                self.kill()
        if hung:
            raise VmError(f"{self.name}: did not quit within {QUIT_DEADLINE_S} s:\n{hung}")

    async def _abort(self) -> str:
        """Have a hung process write the stacks of its threads, and return all it said."""
        assert self.process is not None
        self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(VmError):
            await self.wait_exit(2.0)
        return self.messages()

    def kill(self) -> None:
        """End the process at once if it still runs and remove its folder; any number of times."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.last_words = self.last_words or self.messages()
        shutil.rmtree(self.folder, ignore_errors=True)

    def resident_bytes(self) -> int:
        """What the process has in memory (VmRSS of /proc/PID/status)."""
        assert self.process is not None
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        (kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        return kib * 1024

    def messages(self) -> str:
        """What it wrote to stdout and stderr so far."""
        path = self.folder / "errors"
        return path.read_text(errors="replace") if path.exists() else ""

    def output(self) -> str:
        """What the guest wrote to the serial port so far."""
        path = self.folder / "serial"
        return path.read_text(encoding="latin-1") if path.exists() else ""

    async def wait_output(self, satisfied: Callable[[str], bool], timeout_s: float = WAIT_DEADLINE_S) -> str:
        """Wait until `satisfied` holds of the serial output and return that."""
        try:
            async with asyncio.timeout(timeout_s):
                while not satisfied(text := self.output()):
                    if self.exit_code is not None:
                        raise VmError(f"{self.name}: exited with {self.exit_code}:\n{self.messages()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise VmError(
                f"{self.name}: serial output after {timeout_s} s: {self.output()[-400:]!r}"
            ) from error
        return text

    # QMP ------------------------------------------------------------------------------------------

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Execute one command; a '_' in an argument's name stands for '-', a final one is dropped."""
        renamed = {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()}
        try:
            return await self.client.execute(command, renamed or None)
        except (ExecInterruptedError, EOFError) as error:
            raise VmError(f"{self.name}: gone during {command}\n{self.messages()}") from error

    async def hmp(self, line: str) -> str:
        """Execute one monitor line and return its text."""
        return str(await self.client.execute("human-monitor-command", {"command-line": line}))

    def mark(self) -> int:
        """A place in the event log, for `since`."""
        return len(self.events.events)

    async def wait_event(
        self,
        name: str,
        predicate: Predicate | None = None,
        timeout_s: float = WAIT_DEADLINE_S,
        since: int = 0,
    ) -> Message:
        """Wait for an event; one that came already counts. Raises VmError with the events that did come."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.events.wait(name, predicate, since)
        except TimeoutError as error:
            seen = [(event["event"], event.get("data")) for event in self.events.events[since:]]
            raise VmError(
                f"{self.name}: no {name} in {timeout_s} s; came: {seen}\n{self.messages()}"
            ) from error

    async def wait_run_state(self, *states: str, timeout_s: float = WAIT_DEADLINE_S) -> str:
        """Wait until query-status shows one of `states`."""
        return await self._wait_status("query-status", states, frozenset(), timeout_s)

    async def wait_migration(self, *states: str, timeout_s: float = 2 * WAIT_DEADLINE_S) -> str:
        """Wait until query-migrate shows one of `states` ("completed" by default).

        Raises VmError when it ends in another one, and after `timeout_s`.
        """
        return await self._wait_status("query-migrate", states or ("completed",), ENDED, timeout_s)

    async def _wait_status(
        self, command: str, states: Sequence[str], last: frozenset[str], timeout_s: float
    ) -> str:
        reply: Message = {}
        try:
            async with asyncio.timeout(timeout_s):
                while (status := str((reply := await self.qmp(command)).get("status", "none"))) not in states:
                    if status in last:
                        raise VmError(f"{self.name}: {command} ended with {reply}\n{self.messages()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise VmError(
                f"{self.name}: {command} after {timeout_s} s: {reply}\n{self.messages()}"
            ) from error
        return status

    async def set_capabilities(self, **capabilities: bool) -> None:
        """Switch migration capabilities, named with '_' for '-'."""
        listed = [{"capability": k.replace("_", "-"), "state": v} for k, v in capabilities.items()]
        await self.qmp("migrate-set-capabilities", capabilities=listed)

    async def memory(self, address: int, length_bytes: int) -> bytes:
        """Guest physical memory, by `pmemsave`; stop the guest first for one consistent picture."""
        path = self.folder / "memory"
        await self.qmp("pmemsave", val=address, size=length_bytes, filename=str(path))
        try:
            return path.read_bytes()
        finally:
            path.unlink()

    async def first_bytes(self, start: int, end: int) -> bytes:
        """The first byte of each page of [start, end) of guest memory."""
        return (await self.memory(start, end - start))[::PAGE_BYTES]


class StockVM(VM):
    """One stock QEMU process (TCG), with the same face."""

    program: Sequence[str] = ("qemu-system-x86_64", "-accel", "tcg")
    common_options: Sequence[str] = ("-display", "none", "-nodefaults", "-no-user-config")
