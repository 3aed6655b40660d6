"""The machine: RAM, vCPU and devices, and the control of its life. No JSON, no asyncio; any thread may call.

    start() --> prelaunch | inmigrate | running      cont() / stop()      reset()      request_shutdown()

The life of a stop:
1. (any thread) a caller sets the run state and the vCPU's stop flag, and STOP is emitted;
2. (vcpu) its thread leaves the engine at the end of its block and acknowledges;
3. (any thread) `stop` returns True.
Between 1 and 2 the guest may still run, or be parked on a page of postcopy that is to come: whoever needs
the guest still waits for the acknowledgement. What the rest of the block says is held in the device until the
guest goes on. If `stop` does not wait that long, the vCPU sees to it that the stop is not lost.

A guest that exits or resets through a port latches: port I/O of the rest of the block is dropped, and
`_vcpu_exit` decides on the vCPU's thread, when nothing runs any more. A panic does not: a guest that may
go on after it loses nothing.

Rules:
1. The run state changes in `_move`, under the lock, by the table of vmm.run_state.
2. Nobody waits under the lock. STOP and RESUME are told under it, so that they come in the moves' order.
3. The vCPU is let run in `_let_run` only; within `vcpu_quiet` and a reset by the host nobody lets it.
4. A reset that a user asked for may wait for pages, so it runs on a thread of its own ("reset").

Source of the behaviour: QEMU 7.2 softmmu/runstate.c, softmmu/cpus.c, monitor/qmp-cmds.c,
migration/migration.c.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vmm.clock import VirtualClock
from vmm.config import MachineConfig
from vmm.cpu.cpuid import CpuModel
from vmm.cpu.engine import Engine, Exit, ExitReason
from vmm.cpu.paging import PAGE, translate
from vmm.cpu.ticker import Ticker
from vmm.cpu.vcpu import Vcpu
from vmm.errors import CpuError, MachineError, PageferryError
from vmm.machine_build import make_ram, read_image
from vmm.machine_devices import Devices, GuestWish
from vmm.machine_sections import CpuCommonSection, CpuSection, GlobalStateSection, TimerSection
from vmm.ram import RAMBlock
from vmm.run_state import NEEDS_RESET, RunState, check_move
from vmm.timers import Timers
from vmm.vmstate import Section, Values

__all__ = ["Machine", "Notify"]

log = logging.getLogger(__name__)

Notify = Callable[[str, dict[str, Any]], None]
"""Called with a QMP event's name and data, on any thread; must not wait."""

BY_HOST = ("host-qmp-quit", "host-signal", "host-ui", "host-error")
"""Shutdowns that end the process whatever -no-shutdown says."""
EXIT_FAILURE = 1
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
        self.devices = Devices(config, self.ram, self.engine, self.clock, self.timers, self._guest_wishes)
        self.engine.set_port_handlers(self.devices.bus.read, self.devices.bus.write)
        self._global_state = GlobalStateSection()
        self._listeners: tuple[Notify, ...] = ()
        self._lock = threading.RLock()  # protects the run state, what goes with it, and the order of events
        self._run_state = RunState.PRELAUNCH
        self._autostart = not config.start_paused
        self._wish: tuple[GuestWish, int] | None = None
        self._reset_thread: threading.Thread | None = None
        self._closing = False
        self._quiet = 0

    # ---- asking ----

    @property
    def run_state(self) -> RunState:
        """As query-status shows it."""
        return self._run_state

    @property
    def vcpu_is_paused(self) -> bool:
        """Has the vCPU acknowledged a stop? If not, it runs, or waits for a page."""
        return self.vcpu.is_paused

    @property
    def cpu_log(self) -> Engine:
        """The engine's store log, for the dirty log's last rung."""
        return self.engine

    def add_listener(self, notify: Notify) -> None:
        """Have `notify` called with STOP, RESUME, SHUTDOWN, RESET and GUEST_PANICKED."""
        self._listeners = (*self._listeners, notify)

    def sections(self) -> list[Section]:
        """What travels, in stock's order.

        A device that stock's machine does not have travels only once its state is not that of a reset: so
        streams of guests that do not use it fit stock. A destination takes whatever may come.
        """
        return [
            TimerSection(self.engine, self.clock),
            CpuCommonSection(self.engine),
            CpuSection(self.engine),
            *self.devices.sections(everything=self._run_state is RunState.INMIGRATE),
            self._global_state,
        ]

    # ---- life ----

    def start(self) -> None:
        """Load the boot image, start the vCPU's thread, and the guest unless -S or -incoming."""
        self._ticker.start()
        self.vcpu.start_thread()
        self.vcpu.wait_paused(None)  # it starts paused; until it says so no state can be read
        if self.config.incoming is not None:
            self._move(RunState.INMIGRATE)
            return
        self._load_image()
        if self._autostart:
            self.cont()

    def cont(self) -> None:
        """Let the guest run; while a migration comes in: let it run once it is here.

        Raises MachineError in the states that only a reset leaves, in the middle of a migration, and when the
        guest is another machine's.
        """
        with self._lock:
            state = self._run_state
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
            self._run()

    def stop(self, target: RunState = RunState.PAUSED, wait_s: float | None = None) -> bool:
        """Stop the guest and wait up to `wait_s` seconds (None: for ever) for the vCPU's acknowledgement.

        False if it did not come in time; the guest then stops as soon as it can. While a migration comes in:
        keep the guest stopped once it is here. A guest that does not run keeps its run state.
        """
        with self._lock:
            if self._run_state is RunState.INMIGRATE:
                self._autostart = False
                return True
            if self._run_state is RunState.RUNNING:
                self._halt(target)
            elif self._run_state is RunState.FINISH_MIGRATE and self._global_state.stored is RunState.RUNNING:
                self._global_state.stored = target
        acknowledged = self.vcpu.wait_paused(wait_s)
        if not acknowledged:
            self.vcpu.insist()
        return acknowledged

    def set_run_state(self, new: RunState) -> None:
        """Raises IllegalRunState; the guest neither starts nor stops by it."""
        with self._lock:
            self._move(new)

    def request_shutdown(self, cause: str, guest: bool, exit_status: int = 0) -> None:
        """Emit SHUTDOWN, then end the process; -no-shutdown stops the guest unless the host wants the end."""
        log.info("shutdown: %s", cause)
        self.devices.serial.flush_output()
        self._notify("SHUTDOWN", {"guest": guest, "reason": cause})
        if self.config.actions.shutdown == "pause" and cause not in BY_HOST:
            self._stop_now(RunState.SHUTDOWN)
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
        with self._lock:
            if self._run_state is RunState.INMIGRATE:
                raise MachineError("Guest is waiting for an incoming migration")
            if self._run_state is RunState.FINISH_MIGRATE:
                raise MachineError("Migration is not finalized yet")
            if self.config.actions.reboot == "shutdown":
                self.request_shutdown(cause, guest=cause.startswith("guest"))
                return
            if self._closing or (self._reset_thread is not None and self._reset_thread.is_alive()):
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
        with self._lock:
            self._quiet += 1
            self.vcpu.request_pause()
        try:
            if not self.vcpu.wait_paused(wait_s):
                raise MachineError("The vCPU waits for a page of memory: its state is not known")
            yield self.engine.get_cpu_state()
        finally:
            with self._lock:
                self._quiet -= 1
                self._let_run()

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
        with self._lock:
            self._closing = True
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
        with self._lock:
            self._quiet += 1
            self.vcpu.request_pause()
        try:
            self.vcpu.wait_paused(None)
            yield
        finally:
            with self._lock:
                self._quiet -= 1
                self._let_run()

    def stop_for_migration(self, wait_s: float | None) -> bool:
        """Stop the guest for the switchover, remembering what it did; to be repeated until True."""
        with self._lock:
            if self._run_state is not RunState.FINISH_MIGRATE:
                self._global_state.stored = self._run_state
                if self._run_state is RunState.RUNNING:
                    self._halt(RunState.FINISH_MIGRATE)
                else:
                    self._move(RunState.FINISH_MIGRATE)
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
        with self._lock:
            if self._run_state is not RunState.FINISH_MIGRATE:
                return
            # Not what it did then: the guest may have ended itself, or a user stopped it, since.
            before = self._global_state.stored
            if before is RunState.RUNNING:
                self._run()
            else:
                self._move(before)

    def start_after_migration(self) -> None:
        """The guest is here: go on as it did there, unless -S or `stop` keep it paused."""
        with self._lock:
            state = self._global_state.received or RunState.RUNNING
            self._global_state.received = None
            if state is not RunState.RUNNING:
                self._move(state)
            elif self._autostart:
                self._run()
            else:
                self._move(RunState.PAUSED)

    def forget_incoming_state(self) -> None:
        """A migration that came in has failed: devices and CPU as after a reset, no translated code."""
        self._global_state.received = None
        self.devices.reset()
        self.engine.reset()
        self.engine.flush()

    # ---- moves, under the lock ----

    def _move(self, new: RunState) -> None:
        check_move(self._run_state, new)
        if new is not self._run_state:
            log.info("run state %s -> %s", self._run_state, new)
            self._run_state = new

    def _run(self) -> None:
        self._move(RunState.RUNNING)
        self._notify("RESUME", {})
        self.devices.release_output()
        self.engine.enable_ticks()
        self.clock.start()
        self.timers.resume()
        self.devices.virtio.resume()
        self._let_run()

    def _let_run(self) -> None:
        if self._run_state is RunState.RUNNING and not self._quiet and not self._closing:
            self.vcpu.resume()

    def _halt(self, target: RunState) -> None:
        check_move(self._run_state, target)
        self.vcpu.request_pause()
        self.devices.hold_output()
        self.clock.stop()
        self.timers.pause()
        self.devices.virtio.pause()
        self.engine.disable_ticks()
        self._move(target)
        self._notify("STOP", {})

    def _stop_now(self, target: RunState) -> None:
        """As QEMU's vm_stop, without waiting: a guest that does not run keeps its run state."""
        with self._lock:
            if self._run_state is RunState.RUNNING:
                self._halt(target)
            elif self._run_state is RunState.FINISH_MIGRATE:
                self._global_state.stored = target  # it ended itself while a migration stopped it

    def _notify(self, name: str, data: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(name, data)

    # ---- what the guest does to itself; the vCPU's thread ----

    def _guest_wishes(self, wish: GuestWish, exit_status: int) -> None:
        """In a port handler, inside of the run."""
        if wish is GuestWish.CRASH_LOADED:
            self._notify("GUEST_CRASHLOADED", {"action": "run"})
        elif wish is GuestWish.PANIC:
            self._guest_panicked()
        else:
            self._latch(wish, exit_status)

    def _latch(self, wish: GuestWish, exit_status: int) -> None:
        """Note it and end the run."""
        self._wish = (wish, exit_status)
        self.engine.latch()

    def _vcpu_exit(self, result: Exit) -> None:
        wish, self._wish = self._wish, None
        self.devices.serial.flush_output()
        try:
            if result.reason is ExitReason.INTERNAL_ERROR:
                log.error("the vCPU has failed: %s", result.text)
                self._stop_now(RunState.INTERNAL_ERROR)
            elif result.reason is ExitReason.TRIPLE_FAULT:
                self._guest_reset()
            else:
                assert wish is not None  # only `_guest_wishes` latches
                self._grant(*wish)
        except BaseException as error:
            log.error("the machine has failed: %s", error, exc_info=not isinstance(error, PageferryError))
            self._stop_now(RunState.INTERNAL_ERROR)

    def _grant(self, wish: GuestWish, exit_status: int) -> None:
        if wish is GuestWish.RESET:
            self._guest_reset()
        else:
            cause = "guest-shutdown" if wish is GuestWish.EXIT else "guest-panic"
            self.request_shutdown(cause, guest=True, exit_status=exit_status)

    def _guest_reset(self) -> None:
        if self.config.actions.reboot == "shutdown":
            self.request_shutdown("guest-reset", guest=True)
            return
        self._reset_state("guest-reset", guest=True)
        self._go_on()

    def _guest_panicked(self) -> None:
        actions = self.config.actions
        if actions.panic == "none":
            self._notify("GUEST_PANICKED", {"action": "run"})
            return
        pause = actions.panic == "pause" or (actions.panic == "shutdown" and actions.shutdown == "pause")
        self._notify("GUEST_PANICKED", {"action": "pause" if pause else "poweroff"})
        self._stop_now(RunState.GUEST_PANICKED)
        if not pause:
            self._latch(GuestWish.PANIC, EXIT_FAILURE if actions.panic == "exit-failure" else 0)

    def _go_on(self) -> None:
        """An exit has paused the vCPU by itself: run on, unless somebody stopped the guest meanwhile."""
        with self._lock:
            self._let_run()

    # ---- reset ----

    def _reset_by_host(self, cause: str) -> None:
        with self._lock:
            self._quiet += 1  # a `cont` that comes meanwhile takes effect when the reset is done
            self.vcpu.request_pause()
        try:
            while not self.vcpu.wait_paused(0.1):
                if self._closing:
                    return
            self._reset_state(cause, guest=False)
            with self._lock:
                if self._run_state not in (RunState.RUNNING, RunState.INMIGRATE, RunState.FINISH_MIGRATE):
                    self._move(RunState.PRELAUNCH)
        except (PageferryError, CpuError) as error:
            log.error("the reset has failed: %s", error)
            self._stop_now(RunState.INTERNAL_ERROR)
        finally:
            with self._lock:
                self._quiet -= 1
                self._let_run()

    def _reset_state(self, cause: str, *, guest: bool) -> None:
        """Devices, CPU and boot image as at the start. The vCPU does not run."""
        self.devices.reset()
        self.engine.reset()
        self._load_image()
        self._notify("RESET", {"guest": guest, "reason": cause})

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
