"""The composition root: settings -> machine, migrator and control on one asyncio loop, from start to exit.

    1 open QMP monitors     2 make the machine     3 open the other backends     4 tell that we listen
    5 wait for wait=on      6 start the machine, execute commands      7 ... until somebody wants the end ...
    8 the way out

Clients are greeted while the machine and the migration stack are still imported, which takes longest.
The way out has a deadline, since any thread may be parked on a page that never comes: after EXIT_DEADLINE_S
the terminal is restored, sockets and pidfile are removed, and the process ends where it stands. With pages
missing nothing of RAM is unregistered or closed in any case: missing pages would turn into zeroes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from qmp.server import QmpServer
from vmm.chardev.address import socket_address
from vmm.chardev.registry import Chardevs
from vmm.config import MonitorConfig, Settings
from vmm.control.vocabulary import BANNER, Vocabulary, make_vocabulary
from vmm.daemon import Readiness, write_pidfile
from vmm.errors import ChardevError, MachineError, OptionError, PageferryError

if TYPE_CHECKING:
    from vmm.control.console import HumanConsole
    from vmm.control.http import HttpControl
    from vmm.control.wiring import Control
    from vmm.machine import Machine
    from vmm.migration.migrator import Migrator

__all__ = ["run"]

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0002
"""How long a busy thread may keep the GIL from the loop: with the default 5 ms QMP takes up to 138 ms."""
EXIT_DEADLINE_S = 3.0
FLUSH_S = 0.5
JOIN_S = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(settings: Settings, readiness: Readiness) -> int:
    """Until the end of the VM; gives the exit status. Raises PageferryError if it does not come up."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a monitor may have many clients
    with asyncio.Runner() as runner:
        return runner.run(_main(settings, readiness))


async def _main(settings: Settings, readiness: Readiness) -> int:
    app = App(settings, asyncio.get_running_loop())
    try:
        await app.come_up(readiness)
    except BaseException as error:
        if isinstance(error, PageferryError):
            readiness.failed(str(error))
            app.request_end(1)
        else:
            app.arm_deadline()
            await app.go_down()
            raise
    return await app.serve()


class App:
    """One VM process."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._end = asyncio.Event()
        self._exit_status = 0
        self._chardevs = Chardevs(settings.chardevs, loop, lambda: self.request_end(0))
        self._machine: Machine | None = None
        self._migrator: Migrator | None = None
        self._server: QmpServer | None = None
        self._http: HttpControl | None = None
        self._control: Control | None = None
        self._consoles: list[HumanConsole] = []
        self._pidfile: str | None = None
        self._deadline: threading.Timer | None = None

    # ---- up ----

    async def come_up(self, readiness: Readiness) -> None:
        """Steps 1 to 6. Raises PageferryError; `go_down` is due all the same."""
        settings = self._settings
        vocabulary = make_vocabulary(hide_unstable=settings.compat.get("unstable-output") == "hide")
        self._server = QmpServer(vocabulary.dispatcher, vocabulary.hub, held=True)
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        for monitor in settings.monitors:
            if not monitor.readline:
                await self._open_monitor(self._server, monitor)
        await self._import_the_rest()
        from vmm.machine import Machine

        self._machine = machine = Machine(settings.machine)
        machine.on_power_off = self._on_power_off
        if settings.serial is not None:
            backend = await self._chardevs.open(settings.serial)
            machine.devices.serial.sink = backend
            backend.attach(machine.devices.serial)
        virtio_console = machine.devices.virtio.console
        if settings.console is not None and virtio_console is not None:
            virtio_console.sink = port = await self._chardevs.open(settings.console)
            port.attach(virtio_console)
        self._control = control = self._make_control(machine, vocabulary)
        for monitor in settings.monitors:
            if monitor.readline:
                await self._open_console(control, monitor)
        await self._open_http(control, machine)
        self._write_pidfile()
        incoming = settings.machine.incoming
        if incoming is not None:
            machine.start()  # a source may be there as soon as we listen, and must find us in inmigrate
            if incoming != "defer":
                self._listen_for_migration(incoming)
        readiness.succeeded()
        await self._wait_clients()
        if incoming is None:
            machine.start()
        gc.freeze()
        gc.enable()
        self._server.release()
        for console in self._consoles:
            console.release()
        if self._http is not None:
            self._http.release()

    async def _import_the_rest(self) -> None:
        """What takes longest to import, on a thread: the loop greets clients meanwhile."""
        done = asyncio.Event()

        def work() -> None:
            with contextlib.suppress(Exception):  # raised again where the module is used
                import vmm.control.wiring
                import vmm.machine
                import vmm.migration.migrator  # noqa: F401 - for the one who imports it next
            self._loop.call_soon_threadsafe(done.set)

        thread = threading.Thread(target=work, name="import")
        thread.start()
        await done.wait()
        thread.join()

    def _make_control(self, machine: Machine, vocabulary: Vocabulary) -> Control:
        from vmm.control.wiring import build_control
        from vmm.migration.migrator import Migrator

        settings = self._settings

        def notify(name: str, data: dict[str, Any]) -> None:
            control.notify(name, data)

        self._migrator = migrator = Migrator(machine, notify)
        for name, value in settings.migration_globals:
            try:
                migrator.set_global(name, value)
            except (PageferryError, ValueError, KeyError) as error:
                raise OptionError(str(error), f"-global migration.{name}={value}") from error
        control = build_control(
            machine,
            migrator,
            loop=self._loop,
            vocabulary=vocabulary,
            cpu_thread_ids=_cpu_thread_ids,
            chardevs=self._chardevs.describe,
            disks=machine.devices.virtio.describe_disks,
        )

        def on_reset(name: str, data: dict[str, Any]) -> None:
            if name == "RESET":
                migrator.guest_was_reset()

        machine.add_listener(on_reset)
        return control

    async def _open_console(self, control: Control, monitor: MonitorConfig) -> None:
        from vmm.control.console import HumanConsole

        port = await self._chardevs.open(monitor.chardev)
        console = HumanConsole(control.human, port, BANNER, self._loop)
        self._consoles.append(console)
        port.attach(console)
        port.when_focused(console.focus)
        port.when_opened(console.opened)

    async def _open_monitor(self, server: QmpServer, monitor: MonitorConfig) -> None:
        config = self._chardevs.config(monitor.chardev)
        if config.backend == "stdio":
            await server.serve_fds(0, 1, pretty=monitor.pretty)
            return
        address = socket_address(config, pretty=monitor.pretty)
        try:
            await (server.listen(address) if address.server else server.connect(address))
        except OSError as error:
            raise ChardevError(f"{monitor.option}: {error.strerror or error}") from error

    async def _open_http(self, control: Control, machine: Machine) -> None:
        if self._settings.http is None:
            return
        from vmm.control.http import HttpControl

        assert self._migrator is not None
        server = self._server
        self._http = HttpControl(
            self._settings.http,
            control,
            machine,
            self._migrator,
            lambda: 0 if server is None else server.client_count,
        )
        await self._http.open()

    def _listen_for_migration(self, uri: str) -> None:
        assert self._machine is not None
        assert self._migrator is not None
        try:
            self._migrator.incoming(uri)
        except OSError as error:
            raise MachineError(f"-incoming {uri}: {error.strerror or error}") from error
        except PageferryError as error:
            raise OptionError(str(error), f"-incoming {uri}") from error

    def _write_pidfile(self) -> None:
        path = self._settings.pidfile
        if path is None:
            return
        path = os.path.abspath(path)  # a daemon changes its folder
        try:
            write_pidfile(path)
        except OSError as error:
            raise OptionError(f"Cannot create PID file: {error.strerror}", f"-pidfile {path}") from error
        self._pidfile = path

    async def _wait_clients(self) -> None:
        """wait=on; a wish to end is heard meanwhile."""
        assert self._server is not None
        waits = [asyncio.ensure_future(self._chardevs.wait_clients())]
        waits.append(asyncio.ensure_future(self._server.wait_clients()))
        ending = asyncio.ensure_future(self._end.wait())
        try:
            everybody = asyncio.gather(*waits)
            await asyncio.wait((everybody, ending), return_when=asyncio.FIRST_COMPLETED)
            if not everybody.done():
                everybody.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await everybody
        finally:
            ending.cancel()

    # ---- the end ----

    def request_end(self, exit_status: int) -> None:
        """On the loop's thread: the process shall end with this status; the first wish counts."""
        if not self._end.is_set():
            self._exit_status = exit_status
            self._end.set()
            self.arm_deadline()

    def arm_deadline(self) -> None:
        """From now on the process ends within EXIT_DEADLINE_S, whatever hangs."""
        if self._deadline is None:
            self._deadline = threading.Timer(EXIT_DEADLINE_S, self._give_up)
            self._deadline.daemon = True
            self._deadline.start()

    def _on_power_off(self, exit_status: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are ending already
            self._loop.call_soon_threadsafe(self.request_end, exit_status)

    def _on_signal(self, number: int) -> None:
        if self._end.is_set():
            self._give_up()
        log.info("terminating on signal %d", number)
        if self._machine is None:
            self.request_end(0)
        else:
            self._machine.request_shutdown("host-signal", guest=False)

    async def serve(self) -> int:
        """Until somebody wants the end, and down."""
        await self._end.wait()
        await self.go_down()
        return self._exit_status

    async def go_down(self) -> None:
        """Give everything back; if a thread is parked for good the process ends here."""
        machine, migrator = self._machine, self._migrator
        if machine is not None:
            machine.vcpu.request_pause()
        await self._chardevs.drain(FLUSH_S)
        if self._control is not None:
            self._control.notify.deliver()  # what waits for the loop's next look would come too late
        if self._http is not None:
            await self._http.close(FLUSH_S)
        if self._server is not None:
            await self._server.close(FLUSH_S)
        self._chardevs.close()
        self._remove_pidfile()
        if migrator is not None and migrator.has_missing_pages:
            self._leave()
        ended = migrator is None or migrator.shutdown(JOIN_S)
        if machine is not None:
            ended = machine.close(JOIN_S) and ended
        if not ended:
            self._leave()
        if self._deadline is not None:
            self._deadline.cancel()

    def _leave(self) -> None:
        """End here and now: nothing may run that closes a descriptor or unmaps RAM."""
        self._chardevs.restore_terminal()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self._exit_status)

    def _give_up(self) -> None:
        """The deadline's thread, or a second signal."""
        if self._http is not None:
            self._http.unlink()
        self._chardevs.unlink()
        for monitor in self._settings.monitors:
            config = self._chardevs.config(monitor.chardev)
            if config.server and config.path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(config.path)
        self._remove_pidfile()
        self._leave()

    def _remove_pidfile(self) -> None:
        path, self._pidfile = self._pidfile, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _cpu_thread_ids() -> list[int]:
    return [
        thread.native_id for thread in threading.enumerate() if thread.name == "vcpu" and thread.native_id
    ]
