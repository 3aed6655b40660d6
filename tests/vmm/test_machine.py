"""The machine with the real engine: run control, what guests do to themselves, and what travels."""

from __future__ import annotations

import pathlib
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.assemble import assemble
from tests.support.requires import requires
from vmm.config import ActionConfig, BackendConfig, DeviceConfig, MachineConfig
from vmm.errors import BootError, DeviceError, IllegalRunState, MachineError
from vmm.machine import Machine
from vmm.run_state import RunState
from vmm.vmstate import BytesSource, decode, encode

MIB = 1 << 20
DEADLINE_S = 60.0

PRINT = "mov $0x3f8, %dx; mov ${byte}, %al; out %al, (%dx)\n"
HANG = "1: jmp 1b\n"
EXIT = DeviceConfig("isa-debug-exit", {"iobase": 0xF4, "iosize": 4})
PANIC = DeviceConfig("pvpanic", {"ioport": 0x505, "events": 3})


def say(text: str) -> str:
    return "".join(PRINT.format(byte=ord(character)) for character in text)


class Bench:
    """A machine whose output and events can be waited for."""

    def __init__(self, **config: Any) -> None:
        self.changed = threading.Condition()
        self.output = bytearray()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.exit_status: int | None = None
        ram = (BackendConfig("ram", 2 * MIB),)
        self.machine = Machine(MachineConfig(**{"machine_type": "none", "ram": ram, **config}))
        self.machine.devices.serial.sink = self
        self.machine.add_listener(self._notify)
        self.machine.on_power_off = self._power_off

    # CharSink
    def write_nowait(self, data: bytes) -> int:
        with self.changed:
            self.output += data
            self.changed.notify_all()
        return len(data)

    def accept_input(self) -> None:
        return None

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return True

    def _notify(self, name: str, data: dict[str, Any]) -> None:
        with self.changed:
            self.events.append((name, data))
            self.changed.notify_all()

    def _power_off(self, status: int) -> None:
        with self.changed:
            self.exit_status = status
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S), (self.events, bytes(self.output))

    def wait_state(self, state: RunState) -> None:
        # The run state is set before its event is told, or by the thread that ends soon.
        self.wait_joined()
        assert self.machine.run_state is state

    def wait_joined(self) -> None:
        thread = self.machine._reset_thread
        if thread is not None:
            thread.join(DEADLINE_S)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make_bench(code: str | None = None, *, start: bool = True, **config: Any) -> Bench:
        if code is not None:
            disk = tmp_path / f"disk{len(benches)}"
            disk.write_bytes(assemble(code, 0x7C00, 16).ljust(510, b"\0") + b"\x55\xaa")
            config["boot_drive"] = str(disk)
        bench = Bench(**config)
        benches.append(bench)
        if start:
            bench.machine.start()
        return bench

    yield make_bench
    for bench in benches:
        assert bench.machine.close(DEADLINE_S)


Make = Callable[..., Bench]

# ---- run control ----


def test_a_guest_runs_stops_and_goes_on(make: Make) -> None:
    bench = make(f"2: {say('x')} jmp 2b\n")
    bench.wait(lambda: len(bench.output) > 3)
    assert bench.machine.stop(wait_s=DEADLINE_S)
    assert bench.machine.run_state is RunState.PAUSED
    printed = len(bench.output)
    assert bench.machine.stop(wait_s=DEADLINE_S)
    assert len(bench.output) == printed
    bench.machine.cont()
    bench.machine.cont()
    bench.wait(lambda: len(bench.output) > printed)
    assert bench.names == ["RESUME", "STOP", "RESUME"]


def test_start_paused(make: Make) -> None:
    bench = make(say("x") + HANG, start_paused=True)
    assert bench.machine.run_state is RunState.PRELAUNCH
    assert bench.machine.stop(wait_s=0)
    bench.machine.cont()
    bench.wait(lambda: bench.output == b"x")


def test_a_halted_guest_idles_and_stops_at_once(make: Make) -> None:
    bench = make(say("x") + "hlt\n" + say("y") + HANG)
    bench.wait(lambda: bench.output == b"x")
    assert bench.machine.stop(wait_s=DEADLINE_S)
    bench.machine.cont()
    assert bench.machine.stop(wait_s=DEADLINE_S)
    assert bench.output == b"x"
    assert bench.machine.engine.halted


def test_the_guests_clocks_stand_still_while_it_does(make: Make) -> None:
    bench = make(HANG)
    bench.machine.stop(wait_s=DEADLINE_S)
    before = bench.machine.clock.now_ns(), bench.machine.engine.ticks
    assert (bench.machine.clock.now_ns(), bench.machine.engine.ticks) == before
    bench.machine.cont()
    assert bench.machine.clock.now_ns() > before[0]


def test_stop_does_not_hang_on_a_guest_that_waits_for_a_page(make: Make) -> None:
    requires("uffd")
    from uffd import Mode, Userfaultfd

    page = 0x100000
    touch = "mov $0xffff, %ax; mov %ax, %ds; movb $1, 0x10\n"  # ffff:0010 is 1 MiB
    bench = make("in $0x92, %al; or $2, %al; out %al, $0x92\n" + touch + say("y") + HANG, start=False)
    ram = bench.machine.ram.blocks[0]
    address = ram.host_address + page
    faults = Userfaultfd()
    try:
        faults.register(address, 0x1000, Mode.MISSING)
        bench.machine.start()
        assert select.select([faults.fd], [], [], DEADLINE_S)[0]
        assert not bench.machine.stop(wait_s=0.01)
        assert bench.machine.run_state is RunState.PAUSED
        assert bench.names == ["RESUME", "STOP"]
        assert not bench.machine.close(0.01)
    finally:
        assert faults.zeropage(address, 0x1000)[1] == 0
        assert bench.machine.vcpu.wait_paused(DEADLINE_S)
        faults.unregister(address, 0x1000)
        faults.close()


# ---- what guests do to themselves ----


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x10, 0x21)])
def test_debug_exit(make: Make, value: int, status: int) -> None:
    bench = make(say("x") + f"mov ${value}, %al; out %al, $0xf4\n" + say("y") + HANG, devices=(EXIT,))
    bench.wait(lambda: bench.exit_status is not None)
    assert bench.exit_status == status
    assert bench.machine.stop(wait_s=DEADLINE_S)
    assert bench.output == b"x"
    assert bench.events[1] == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})


def test_no_shutdown(make: Make) -> None:
    code = say("x") + "out %al, $0xf4\n" + say("y") + HANG
    bench = make(code, devices=(EXIT,), actions=ActionConfig(shutdown="pause"))
    bench.wait(lambda: "STOP" in bench.names)
    assert bench.names == ["RESUME", "SHUTDOWN", "STOP"]
    assert bench.machine.run_state is RunState.SHUTDOWN
    assert bench.exit_status is None
    with pytest.raises(MachineError, match="Resetting the Virtual Machine is required"):
        bench.machine.cont()
    bench.machine.reset("host-qmp-system-reset")
    bench.wait(lambda: "RESET" in bench.names)
    bench.wait_state(RunState.PRELAUNCH)
    bench.machine.cont()
    bench.wait(lambda: bench.output == b"xx")
    bench.machine.request_shutdown("host-qmp-quit", guest=False)
    assert bench.exit_status == 0


RESETS = {
    "port 92": "in $0x92, %al; or $1, %al; out %al, $0x92\n",
    "keyboard controller": "mov $0xfe, %al; out %al, $0x64\n",
    "triple fault": "lidt zero; int3\nzero: .quad 0\n",
}


@pytest.mark.parametrize("way", RESETS)
def test_guest_reset(make: Make, way: str) -> None:
    # The first life leaves a mark in RAM, which no reset clears; the second one finds it and stays.
    code = (
        "xor %ax, %ax; mov %ax, %ds; mov 0x600, %bl; movb $1, 0x600\n"
        f"test %bl, %bl; jnz second\n{say('1')}{RESETS[way]}{say('!')}second: {say('2')}{HANG}"
    )
    bench = make(code)
    bench.wait(lambda: b"2" in bench.output)
    assert bench.output == b"12"
    assert bench.events == [("RESUME", {}), ("RESET", {"guest": True, "reason": "guest-reset"})]
    assert bench.machine.run_state is RunState.RUNNING


def test_no_reboot(make: Make) -> None:
    bench = make(say("1") + RESETS["triple fault"], actions=ActionConfig(reboot="shutdown"))
    bench.wait(lambda: bench.exit_status == 0)
    assert bench.events[1:] == [("SHUTDOWN", {"guest": True, "reason": "guest-reset"})]


@pytest.mark.parametrize(
    ("panic", "shutdown", "events", "status"),
    [
        ("shutdown", "poweroff", ["GUEST_PANICKED", "STOP", "SHUTDOWN"], 0),
        ("exit-failure", "poweroff", ["GUEST_PANICKED", "STOP", "SHUTDOWN"], 1),
        ("shutdown", "pause", ["GUEST_PANICKED", "STOP"], None),
        ("pause", "poweroff", ["GUEST_PANICKED", "STOP"], None),
        ("none", "poweroff", ["GUEST_PANICKED"], None),
    ],
)
def test_panic(make: Make, panic: str, shutdown: str, events: list[str], status: int | None) -> None:
    code = "mov $0x505, %dx; mov $1, %al; out %al, (%dx)\n" + say("y") + HANG
    bench = make(code, devices=(PANIC,), actions=ActionConfig(panic=panic, shutdown=shutdown))
    bench.wait(lambda: bench.names[1:] == events)
    action = {"none": "run", "pause": "pause"}.get(panic, "pause" if shutdown == "pause" else "poweroff")
    assert bench.events[1] == ("GUEST_PANICKED", {"action": action})
    if status is not None:
        bench.wait(lambda: bench.exit_status == status)
        assert bench.output == b""
        return
    if panic != "none":
        assert bench.machine.stop(wait_s=DEADLINE_S)
        assert bench.machine.run_state is RunState.GUEST_PANICKED
        bench.machine.cont()
    bench.wait(lambda: bench.output == b"y")  # a guest that may go on loses nothing


def test_crash_loaded(make: Make) -> None:
    bench = make("mov $0x505, %dx; mov $2, %al; out %al, (%dx)\n" + say("y") + HANG, devices=(PANIC,))
    bench.wait(lambda: bench.output == b"y")
    assert ("GUEST_CRASHLOADED", {"action": "run"}) in bench.events


def test_a_broken_device_stops_the_guest(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    bench = make("out %al, $0x10\n" + HANG, start=False)

    def broken(offset: int, size: int, value: int) -> None:
        raise ZeroDivisionError("a bug")

    bench.machine.devices.bus.add("broken", 0x10, 1, lambda offset: 0, broken)
    bench.machine.start()
    bench.wait(lambda: "STOP" in bench.names)
    assert bench.machine.run_state is RunState.INTERNAL_ERROR
    with pytest.raises(MachineError):
        bench.machine.cont()
    assert "a bug" in caplog.text


def test_unmapped_memory_and_ports_are_an_open_bus(make: Make) -> None:
    code = (
        "in $0x80, %al; cmp $0xff, %al; jne bad\n"
        "mov $0xa000, %ax; mov %ax, %ds; movb $7, 0x0\n"
        f"{say('k')}{HANG}bad: {say('!')}{HANG}"
    )
    bench = make(code)
    bench.wait(lambda: bool(bench.output))
    assert bench.output == b"k"


# ---- a reset by the host ----


def test_host_reset_of_a_running_guest(make: Make) -> None:
    bench = make(say("x") + "movw $0x1234, 0x7c00\n" + HANG)  # it spoils its own first instruction
    bench.wait(lambda: bench.output == b"x")
    bench.machine.reset("host-qmp-system-reset")
    bench.wait(lambda: bench.output == b"xx")
    assert bench.events[1] == ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
    bench.wait_state(RunState.RUNNING)


def test_cont_in_the_middle_of_a_host_reset_waits_for_its_end(make: Make) -> None:
    # stop, system_reset and cont sent at once: the vCPU ran while its registers were being reset.
    bench = make(say("A") + HANG)
    bench.wait(lambda: b"A" in bench.output)
    assert bench.machine.stop()
    in_reset, go_on, reset = threading.Event(), threading.Event(), bench.machine._reset_state

    def slow_reset(cause: str, *, guest: bool) -> None:
        in_reset.set()
        assert go_on.wait(DEADLINE_S)
        reset(cause, guest=guest)

    bench.machine._reset_state = slow_reset  # type: ignore[method-assign]  # held in its middle
    bench.machine.reset("host-qmp-system-reset")
    assert in_reset.wait(DEADLINE_S)
    bench.machine.cont()
    assert bench.machine.vcpu.is_paused
    go_on.set()
    bench.wait(lambda: bench.output == b"AA")
    bench.wait_state(RunState.RUNNING)
    assert bench.names == ["RESUME", "STOP", "RESUME", "RESET"]


def test_host_reset_with_no_reboot(make: Make) -> None:
    bench = make(HANG, actions=ActionConfig(reboot="shutdown"))
    bench.machine.reset("host-qmp-system-reset")
    assert bench.events[1] == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"})


# ---- migration ----


def test_sections_in_stocks_order(make: Make) -> None:
    none = make()
    assert [s.idstr for s in none.machine.sections()] == ["timer", "cpu_common", "cpu", "globalstate"]
    none.machine.devices.bus.write(0x3FB, 1, 3)
    assert [s.idstr for s in none.machine.sections()][3:] == ["serial", "globalstate"]
    microvm = make(machine_type="microvm", ram=(BackendConfig("microvm.ram", MIB),))
    assert [s.idstr for s in microvm.machine.sections()][3:] == ["serial", "globalstate"]
    waiting = make(incoming="defer")
    legacy = ["i8259", "i8259", "i8254", "mc146818rtc"]
    assert [s.idstr for s in waiting.machine.sections()][3:] == [
        "apic",
        "port92",
        "serial",
        *legacy,
        "globalstate",
    ]


def test_stopped_for_a_migration_and_back(make: Make) -> None:
    bench = make(f"2: {say('x')} jmp 2b\n")
    assert bench.machine.stop_for_migration(wait_s=DEADLINE_S)
    assert bench.machine.stop_for_migration(wait_s=DEADLINE_S)
    assert bench.machine.run_state is RunState.FINISH_MIGRATE
    with pytest.raises(MachineError, match="Migration is not finalized yet"):
        bench.machine.cont()
    printed = len(bench.output)
    bench.machine.resume_after_migration()
    bench.machine.resume_after_migration()
    bench.wait(lambda: len(bench.output) > printed)
    assert bench.names == ["RESUME", "STOP", "RESUME"]


def test_a_paused_guest_stays_paused_after_a_failed_migration(make: Make) -> None:
    bench = make(HANG, start_paused=True)
    assert bench.machine.stop_for_migration(wait_s=0)
    bench.machine.resume_after_migration()
    assert bench.machine.run_state is RunState.PRELAUNCH
    assert bench.names == []


def test_a_stop_during_the_switchover_counts(make: Make) -> None:
    bench = make(HANG)
    bench.machine.stop_for_migration(wait_s=DEADLINE_S)
    bench.machine.stop(wait_s=DEADLINE_S)
    bench.machine.resume_after_migration()
    assert bench.machine.run_state is RunState.PAUSED


def test_after_the_migration(make: Make) -> None:
    bench = make(HANG)
    for _ in range(2):
        bench.machine.stop_for_migration(wait_s=DEADLINE_S)
        bench.machine.set_run_state(RunState.POSTMIGRATE)
        bench.machine.cont()
    with pytest.raises(IllegalRunState):
        bench.machine.set_run_state(RunState.POSTMIGRATE)
    assert bench.machine.run_state is RunState.RUNNING


def test_nobody_lets_the_vcpu_run_while_it_must_be_quiet(make: Make) -> None:
    bench = make(f"2: {say('x')} jmp 2b\n")
    bench.wait(lambda: len(bench.output) > 0)
    with bench.machine.vcpu_quiet():
        bench.machine.stop(wait_s=DEADLINE_S)
        bench.machine.cont()
        assert bench.machine.vcpu.is_paused
        printed = len(bench.output)
    bench.wait(lambda: len(bench.output) > printed)


def test_a_machine_goes_on_in_another(make: Make) -> None:
    source = make(f"2: {say('a')}{say('b')} jmp 2b\n")
    source.wait(lambda: len(source.output) > 10)
    assert source.machine.stop_for_migration(wait_s=DEADLINE_S)
    source.machine.quiesce_devices(1)
    destination = make(incoming="defer")
    assert destination.machine.run_state is RunState.INMIGRATE
    ram = source.machine.ram.read(0, 2 * MIB)
    destination.machine.ram.write(0, ram)
    known = {section.idstr: section for section in destination.machine.sections()}
    for section in source.machine.sections():
        data = encode(section.description, section.save())
        version = section.description.version
        known[section.idstr].load(decode(section.description, BytesSource(data), version), version)
    destination.machine.start_after_migration()
    destination.wait(lambda: len(destination.output) > 10)
    destination.machine.stop(wait_s=DEADLINE_S)
    printed = bytes(source.output + destination.output)
    assert printed == (b"ab" * len(printed))[: len(printed)]
    assert destination.names == ["RESUME", "STOP"]


@pytest.mark.parametrize(
    ("paused", "wish", "received", "state"),
    [
        (False, None, RunState.RUNNING, RunState.RUNNING),
        (True, None, RunState.RUNNING, RunState.PAUSED),
        (True, "cont", RunState.RUNNING, RunState.RUNNING),
        (False, "stop", RunState.RUNNING, RunState.PAUSED),
        (False, None, RunState.PAUSED, RunState.PAUSED),
        (False, None, RunState.SHUTDOWN, RunState.SHUTDOWN),
        (False, None, None, RunState.RUNNING),
    ],
)
def test_the_run_state_comes_along(
    make: Make, paused: bool, wish: str | None, received: RunState | None, state: RunState
) -> None:
    bench = make(incoming="defer", start_paused=paused)
    with pytest.raises(MachineError, match="waiting for an incoming migration"):
        bench.machine.reset("host-qmp-system-reset")
    if wish is not None:
        getattr(bench.machine, wish)()
    bench.machine._global_state.received = received
    bench.machine.start_after_migration()
    assert bench.machine.run_state is state


def test_a_failed_incoming_migration_leaves_nothing(make: Make) -> None:
    bench = make(incoming="defer")
    before = bench.machine.engine.get_cpu_state()
    bench.machine.engine.set_cpu_state({**before, "env.eip": 0x1234})
    bench.machine.devices.bus.write(0x3FF, 1, 9)
    bench.machine.forget_incoming_state()
    assert bench.machine.engine.get_cpu_state() == before
    assert bench.machine.devices.bus.read(0x3FF, 1) == 0


# ---- bad configurations ----


def test_what_cannot_be_built(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BootError, match="Could not open"):
        Bench(kernel=str(tmp_path / "none"))
    with pytest.raises(DeviceError, match="isa-serial has it"):
        Bench(devices=(DeviceConfig("pvpanic", {"ioport": 0x3F8, "events": 3}),))
