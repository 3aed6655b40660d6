"""The machine: RAM, vCPU and devices put together, and driven. No JSON, no asyncio; any thread may call.

    start() --> prelaunch | inmigrate | running      cont() / stop()      reset()      request_shutdown()

How the guest is let run and stopped is in machine_run.py, what a guest does to itself in machine_wishes.py.

Rules:
1. Nobody waits under the lock of `GuestRun`.
2. A reset that a user asked for may wait for pages, so it runs on a thread of its own ("reset").

Source of the behaviour: QEMU 7.2 softmmu/runstate.c, softmmu/cpus.c, monitor/qmp-cmds.c,
migration/migration.c.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from vmm.clock import VirtualClock
from vmm.config import MachineConfig
from vmm.cpu.cpuid import CpuModel
from vmm.cpu.engine import Engine, Exit
from vmm.cpu.paging import PAGE, translate
from vmm.cpu.ticker import Ticker
from vmm.cpu.vcpu import Vcpu
from vmm.errors import CpuError, MachineError, PageferryError
from vmm.machine_build import make_ram, read_image
from vmm.machine_devices import Devices
from vmm.machine_run import GuestRun, Notify
from vmm.machine_sections import CpuCommonSection, CpuSection, GlobalStateSection, TimerSection
from vmm.machine_wishes import GuestWishes
from vmm.ram import RAMBlock
from vmm.run_state import NEEDS_RESET, RunState
from vmm.timers import Timers
from vmm.vmstate import Section, Values

__all__ = ["Machine", "Notify"]

log = logging.getLogger(__name__)

BY_HOST = ("host-qmp-quit", "host-signal", "host-ui", "host-error")
"""Shutdowns that end the process whatever -no-shutdown says."""
TOP = (1 << 64) - 1


class Machine:
    """One machine, stopped, until `start`."""

    def __init__(self, config: MachineConfig) -> None:
        """Raises PageferryError: RAM, CPU, device or boot image cannot be had as configured."""
        self.config = config
        self.machine_type_name = config.machine_type
        self.dirty_log_rung = config.dirty_log
        self.on_power_off: Callable[[int], None] = lambda status: None
        self.cont_guard: Callable[[], str | None] = lambda: None
        self.on_hand_over_soon: Callable[[], None] = lambda: None
        self._image = read_image(config)
        self.ram = make_ram(config)
        if self._image is not None:
            self._image.check(self.ram)
        self.engine = Engine(CpuModel.parse(config.cpu))
        for region in self.ram.map:
            self.engine.map_ram(region.guest_address, region.host_address, region.length)
        self.ram.add_write_listener(self._ram_written)
        self.vcpu = Vcpu(self.engine)
        self.vcpu.on_exit = self._vcpu_exit
        self._ticker = Ticker(self.engine)
        self.clock = VirtualClock(self.engine.host_ns, self.engine.set_clock)
        self.timers = Timers(self.clock)
        self.devices = Devices(
            config, self.ram, self.engine, self.clock, self.timers, lambda *wish: self._wishes.hear(*wish)
        )
        self.engine.set_port_handlers(self.devices.bus.read, self.devices.bus.write)
        self._global_state = GlobalStateSection()
        self._guest = GuestRun(
            self.vcpu, self.engine, self.clock, self.timers, self.devices, self._global_state
        )
        self._wishes = GuestWishes(
            config.actions, self.engine, self._guest, self.request_shutdown, self._reset_for_guest
        )
        self._autostart = not config.start_paused  # under the guest's lock, as the next one
        self._reset_thread: threading.Thread | None = None

    # ---- asking ----

    @property
    def run_state(self) -> RunState:
        """As query-status shows it."""
        return self._guest.state

    @property
    def vcpu_is_paused(self) -> bool:
        """Has the vCPU acknowledged a stop? If not, it runs, or waits for a page."""
        return self.vcpu.is_paused

    @property
    def cpu_log(self) -> Engine:
        """The engine's store log, for the dirty log's first rung."""
        return self.engine

    def add_listener(self, notify: Notify) -> None:
        """Have `notify` called with STOP, RESUME, SHUTDOWN, RESET and GUEST_PANICKED."""
        self._guest.add_listener(notify)

    def sections(self) -> list[Section]:
        """What travels, in stock's order.

        A device that stock's machine does not have travels only once its state is not that of a reset: so
        streams of guests that do not use it fit stock. A destination takes whatever may come.
        """
        return [
            TimerSection(self.engine, self.clock),
            CpuCommonSection(self.engine),
            CpuSection(self.engine),
            *self.devices.sections(everything=self._guest.state is RunState.INMIGRATE),
            self._global_state,
        ]

    # ---- life ----

    def start(self) -> None:
        """Load the boot image, start the vCPU's thread, and the guest unless -S or -incoming."""
        self._ticker.start()
        self.vcpu.start_thread()
        self.vcpu.wait_paused(None)  # it starts paused; until it says so no state can be read
        if self.config.incoming is not None:
            self._guest.move(RunState.INMIGRATE)
            return
        self._load_image()
        if self._autostart:
            self.cont()

    def cont(self) -> None:
        """Let the guest run; while a migration comes in: let it run once it is here.

        Raises MachineError in the states that only a reset leaves, in the middle of a migration, and when the
        guest is another machine's.
        """
        with self._guest.lock:
            state = self._guest.state
            if state is RunState.RUNNING:
                return
            if state is RunState.INMIGRATE:
                self._autostart = True
                return
            refusal = self.cont_guard()
            if refusal is not None:
                raise MachineError(refusal)
            if state in NEEDS_RESET:
                raise MachineError("Resetting the Virtual Machine is required")
            if state is RunState.FINISH_MIGRATE:
                raise MachineError("Migration is not finalized yet")
            self._guest.run()

    def stop(self, target: RunState = RunState.PAUSED, wait_s: float | None = None) -> bool:
        """Stop the guest and wait up to `wait_s` seconds (None: for ever) for the vCPU's acknowledgement.

        False if it did not come in time; the vCPU then sees to it that the stop is not lost. While a
        migration comes in: keep the guest stopped once it is here. A guest that does not run keeps its run
        state.
        """
        with self._guest.lock:
            state = self._guest.state
            if state is RunState.INMIGRATE:
                self._autostart = False
                return True
            if state is RunState.RUNNING:
                self._guest.halt(target)
            elif state is RunState.FINISH_MIGRATE and self._global_state.stored is RunState.RUNNING:
                self._global_state.stored = target
        acknowledged = self.vcpu.wait_paused(wait_s)
        if not acknowledged:
            self.vcpu.insist()
        return acknowledged

    def set_run_state(self, new: RunState) -> None:
        """Raises IllegalRunState; the guest neither starts nor stops by it."""
        with self._guest.lock:
            self._guest.move(new)

    def request_shutdown(self, cause: str, guest: bool, exit_status: int = 0) -> None:
        """Emit SHUTDOWN, then end the process; -no-shutdown stops the guest unless the host wants the end."""
        log.info("shutdown: %s", cause)
        self.devices.serial.flush_output()
        self._guest.notify("SHUTDOWN", {"guest": guest, "reason": cause})
        if self.config.actions.shutdown == "pause" and cause not in BY_HOST:
            self._guest.stop_now(RunState.SHUTDOWN)
        else:
            self.on_power_off(exit_status)

    def power_off(self, exit_status: int) -> None:
        """End the process soon, with this status and without a word; `request_shutdown` says SHUTDOWN."""
        self.devices.serial.flush_output()
        self.on_power_off(exit_status)

    def reset(self, cause: str) -> None:
        """Reset the machine soon, on a thread of its own; RESET tells when it is done.

        Raises MachineError while a migration comes in, since there is nothing yet to be reset, and while one
        has stopped the guest: its RAM is being sent, and must not change.
        """
        with self._guest.lock:
            if self._guest.state is RunState.INMIGRATE:
                raise MachineError("Guest is waiting for an incoming migration")
            if self._guest.state is RunState.FINISH_MIGRATE:
                raise MachineError("Migration is not finalized yet")
            if self.config.actions.reboot == "shutdown":
                self.request_shutdown(cause, guest=cause.startswith("guest"))
                return
            if self._guest.is_closing or (self._reset_thread is not None and self._reset_thread.is_alive()):
                return
            self._reset_thread = threading.Thread(
                target=self._reset_by_host, args=(cause,), name="reset", daemon=True
            )
            self._reset_thread.start()

    def press_power_button(self) -> None:
        """Tell the guest by ACPI; does nothing on a machine without."""
        if self.devices.power is not None:
            self.devices.power.press_power_button()

    def inject_nmi(self) -> None:
        """A non-maskable interrupt; wakes a halted vCPU."""
        self.engine.inject_nmi()

    @contextlib.contextmanager
    def vcpu_held(self, wait_s: float) -> Iterator[Values]:
        """The vCPU stands still within, and this is its state; for the guest's user nothing happens.

        Raises MachineError if it does not stand still within `wait_s`: it waits for a page.
        """
        with self._guest.kept_from_running():
            if not self.vcpu.wait_paused(wait_s):
                raise MachineError("The vCPU waits for a page of memory: its state is not known")
            yield self.engine.get_cpu_state()

    def virtual_ranges(self, address: int, length: int, wait_s: float) -> list[tuple[int, int]]:
        """Where in guest physical memory the vCPU finds these bytes: (address, length) of each piece.

        Raises MachineError where nothing is mapped, and if the vCPU does not pause within `wait_s` to tell
        its page tables; RamError where these are not in RAM.
        """
        with self.vcpu_held(wait_s) as cpu:
            pass
        ranges: list[tuple[int, int]] = []
        for page in range(address & ~(PAGE - 1), address + length, PAGE):
            physical = translate(self.ram.read, cpu, page)
            if physical is None:
                raise MachineError(f"Invalid addr 0x{address & TOP:016x}/size {length} specified")
            begin, end = max(address - page, 0), min(address + length - page, PAGE)
            ranges.append((physical + begin, end - begin))
        return ranges

    def close(self, timeout_s: float = 1.0) -> bool:
        """End the threads and free everything; False if one is parked for good, and nothing is freed."""
        self._guest.close()
        try:
            ended = self.vcpu.shutdown(timeout_s)
        except BaseException:
            log.exception("the vCPU's thread had failed")
            ended = True
        ended = self._ticker.close(timeout_s) and ended
        ended = self.timers.close(timeout_s) and ended
        ended = self.devices.virtio.close(timeout_s) and ended
        if self._reset_thread is not None:
            self._reset_thread.join(timeout_s)
            ended = ended and not self._reset_thread.is_alive()
        if ended:
            self.engine.close()
            self.ram.close()
        return ended

    # ---- migration ----

    @property
    def vcpu_thread_id(self) -> int:
        """The vCPU's thread as the kernel knows it."""
        return self.vcpu.thread_id

    @contextlib.contextmanager
    def vcpu_quiet(self) -> Iterator[None]:
        """The vCPU does not run within; for the guest's user nothing happens."""
        with self._guest.kept_from_running():
            self.vcpu.wait_paused(None)
            yield

    def stop_for_migration(self, wait_s: float | None) -> bool:
        """Stop the guest for the switchover, remembering what it did; to be repeated until True."""
        with self._guest.lock:
            if self._guest.state is not RunState.FINISH_MIGRATE:
                self._global_state.stored = self._guest.state
                if self._guest.state is RunState.RUNNING:
                    self._guest.halt(RunState.FINISH_MIGRATE)
                else:
                    self._guest.move(RunState.FINISH_MIGRATE)
        if self._reset_thread is not None:
            self._reset_thread.join(wait_s)  # a reset under way still writes to RAM
            if self._reset_thread.is_alive():
                return False
        return self.vcpu.wait_paused(wait_s) and self.devices.virtio.wait_idle(wait_s)

    def quiesce_devices(self, timeout_s: float) -> None:
        """Flush host-side output for at most `timeout_s`; what a full backend leaves in a FIFO travels."""
        self.devices.quiesce(timeout_s)

    def resume_after_migration(self) -> None:
        """The guest stays here after all: give it the run state it had."""
        with self._guest.lock:
            if self._guest.state is not RunState.FINISH_MIGRATE:
                return
            # Not what it did then: the guest may have ended itself, or a user stopped it, since.
            before = self._global_state.stored
            if before is RunState.RUNNING:
                self._guest.run()
            else:
                self._guest.move(before)

    def start_after_migration(self) -> None:
        """The guest is here: go on as it did there, unless -S or `stop` keep it paused."""
        with self._guest.lock:
            state = self._global_state.received or RunState.RUNNING
            self._global_state.received = None
            if state is not RunState.RUNNING:
                self._guest.move(state)
            elif self._autostart:
                self._guest.run()
            else:
                self._guest.move(RunState.PAUSED)

    def forget_incoming_state(self) -> None:
        """A migration that came in has failed: devices and CPU as after a reset, no translated code."""
        self._global_state.received = None
        self.devices.reset()
        self.engine.reset()
        self.engine.flush()

    # ---- the vCPU's thread ----

    def _vcpu_exit(self, result: Exit) -> None:
        self.devices.serial.flush_output()
        self._wishes.grant(result)

    # ---- reset ----

    def _reset_by_host(self, cause: str) -> None:
        guest = self._guest
        with guest.kept_from_running():  # a `cont` that comes meanwhile takes effect when the reset is done
            try:
                while not self.vcpu.wait_paused(0.1):
                    if guest.is_closing:
                        return
                self._reset_state(cause, guest=False)
                with guest.lock:
                    if guest.state not in (RunState.RUNNING, RunState.INMIGRATE, RunState.FINISH_MIGRATE):
                        guest.move(RunState.PRELAUNCH)
            except (PageferryError, CpuError) as error:
                log.error("the reset has failed: %s", error)
                guest.stop_now(RunState.INTERNAL_ERROR)

    def _reset_for_guest(self) -> None:
        self._reset_state("guest-reset", guest=True)

    def _reset_state(self, cause: str, *, guest: bool) -> None:
        """Devices, CPU and boot image as at the start. The vCPU does not run."""
        self.devices.reset()
        self.engine.reset()
        self._load_image()
        self._guest.notify("RESET", {"guest": guest, "reason": cause})

    def _load_image(self) -> None:
        if self._image is None:
            return
        self._image.load(self.ram)
        values: Values = self._image.first_state(self.engine.get_cpu_state())
        self.engine.set_cpu_state(values)

    # ---- RAM ----

    def _ram_written(self, block: RAMBlock, offset: int, length: int) -> None:
        """Bytes changed that the guest did not store: code translated from them is stale."""
        for guest_address, size in self.ram.guest_ranges(block, offset, length):
            self.engine.invalidate(guest_address, size)
