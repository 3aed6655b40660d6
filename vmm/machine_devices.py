"""The machine's devices on their bus, and what of them travels."""

from __future__ import annotations

import enum
from collections.abc import Callable

from vmm.clock import VirtualClock
from vmm.config import MachineConfig
from vmm.cpu.engine import Engine
from vmm.devices.acpi_pm import PM_IRQ, AcpiPm
from vmm.devices.apic import WireApic
from vmm.devices.bus import PortBus
from vmm.devices.control_ports import DebugExit, KeyboardController, Port92, Pvpanic
from vmm.devices.pic import PicSection
from vmm.devices.pit import Pit
from vmm.devices.rtc import Rtc
from vmm.devices.serial import Serial
from vmm.devices.serial_registers import LSR_PORT_OFFSET
from vmm.devices.virtio.bus import VIRTIO_BASE, VIRTIO_LENGTH, VirtioBus
from vmm.ram import GuestRam
from vmm.timers import Timers
from vmm.vmstate import Section, encode

__all__ = ["Devices", "GuestWish"]

COM1 = 0x3F8
COM1_PORTS = 8
COM1_IRQ, RTC_IRQ = 4, 8


class GuestWish(enum.Enum):
    """What a guest asks for through a port; the run ends with it."""

    RESET = "reset"
    EXIT = "exit"
    PANIC = "panic"
    CRASH_LOADED = "crash loaded"


class Devices:
    """Made once; wired to the CPU's engine by the machine."""

    def __init__(
        self,
        config: MachineConfig,
        ram: GuestRam,
        engine: Engine,
        clock: VirtualClock,
        timers: Timers,
        on_wish: Callable[[GuestWish, int], None],
    ) -> None:
        """`on_wish` is called on the vCPU's thread. Raises DeviceError."""
        self._engine = engine
        engine.enable_pics()
        self.bus = PortBus(engine.set_no_device)

        def line(irq: int) -> Callable[[bool], None]:
            return lambda level: engine.set_irq(irq, level)

        timeout = timers.timer(lambda: self.serial.receive_timeout())
        output = timers.timer(lambda: self.serial.flush_output())
        engine.enable_uart(COM1, COM1_IRQ)
        self.serial = Serial(
            now_ns=clock.now_ns,
            publish_lsr=self._publish_lsr,
            set_irq=line(COM1_IRQ),
            set_timer=timeout.set,
            set_output_timer=output.set,
            fast=engine,
        )
        self.bus.add("isa-serial", COM1, COM1_PORTS, self.serial.read_port, self.serial.write_port)

        def on_reset() -> None:
            on_wish(GuestWish.RESET, 0)

        engine.enable_pit()
        self._pit = Pit(self.bus, engine)
        self._rtc = Rtc(self.bus, timers, clock.now_ns, line(RTC_IRQ))
        microvm = config.machine_type == "microvm"
        self.power: AcpiPm | None = None
        if microvm and config.acpi:
            self.power = AcpiPm(self.bus, line(PM_IRQ), lambda: on_wish(GuestWish.EXIT, 0))
        self.virtio = VirtioBus(ram, config.devices, config.drives, line)
        if microvm:
            engine.map_mmio(VIRTIO_BASE, VIRTIO_LENGTH, self.virtio.read, self.virtio.write)
        self._pics = (PicSection(engine, 0), PicSection(engine, 1))
        self._apic = WireApic(engine.model.apic_id, lambda: engine.model.has_apic and self._pics[0].is_used)
        self._port92 = Port92(self.bus, on_reset)
        KeyboardController(self.bus, on_reset)
        for device in config.devices:
            properties = {key: value for key, value in device.properties.items() if isinstance(value, int)}
            if device.driver == "isa-debug-exit":
                DebugExit(self.bus, **properties, on_exit=lambda status: on_wish(GuestWish.EXIT, status))
            elif device.driver == "pvpanic":
                Pvpanic(
                    self.bus,
                    **properties,
                    on_panicked=lambda: on_wish(GuestWish.PANIC, 0),
                    on_crashloaded=lambda: on_wish(GuestWish.CRASH_LOADED, 0),
                )
        self._always: tuple[Section, ...] = (self.serial,) if microvm else ()
        self._when_used: tuple[Section, ...] = (
            self._port92,
            *([self.power] if self.power is not None else ()),
            *(() if microvm else (self.serial,)),
        )
        self._unused = {
            section.idstr: encode(section.description, section.save()) for section in self._when_used
        }

    def reset(self) -> None:
        """As after power-on."""
        self.virtio.reset()
        self.serial.reset()
        if self.power is not None:
            self.power.reset()
        self._port92.reset()
        self._pit.reset()
        self._rtc.reset()

    def sections(self, *, everything: bool) -> list[Section]:
        """See `Machine.sections`."""
        used = [
            section
            for section in self._when_used
            if everything or encode(section.description, section.save()) != self._unused[section.idstr]
        ]
        apic = [self._apic] if everything or self._apic.is_used else []
        legacy = [s for s in (*self._pics, self._pit, self._rtc) if everything or s.is_used]
        return [*apic, *used, *legacy, *self._always, *self.virtio.sections]

    def hold_output(self) -> None:
        """The guest is to stop: nothing of it is heard from now on."""
        self.serial.hold_output()

    def release_output(self) -> None:
        """The guest goes on: what it said since `hold_output` is heard."""
        self.serial.release_output()

    def quiesce(self, timeout_s: float) -> None:
        """Wait until the backends of the consoles have everything, or the time is over; flush disks.

        Raises DeviceError if a disk cannot be flushed.
        """
        self.serial.release_output()
        self.serial.sink.wait_flushed(timeout_s)
        if self.virtio.console is not None:
            self.virtio.console.sink.wait_flushed(timeout_s)
        self.virtio.flush()

    def _publish_lsr(self, value: int | None) -> None:
        if value is None:
            self._engine.clear_fast_read(COM1 + LSR_PORT_OFFSET)
        else:
            self._engine.set_fast_read(COM1 + LSR_PORT_OFFSET, value)
