"""The machine's devices on their bus, and what of them travels."""

from __future__ import annotations

import enum
from collections.abc import Callable

from vmm.clock import VirtualClock
from vmm.config import DeviceConfig, MachineConfig
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
        microvm = config.machine_type == "microvm"
        self._engine = engine
        self._on_wish = on_wish
        self.bus = PortBus(engine.set_no_device)
        engine.enable_pics()
        self._pics = (PicSection(engine, 0), PicSection(engine, 1))
        self._apic = WireApic(engine.model.apic_id, lambda: engine.model.has_apic and self._pics[0].is_used)
        self.serial = self._make_serial(clock, timers)
        engine.enable_pit()
        self._pit = Pit(self.bus, engine)
        self._rtc = Rtc(self.bus, timers, clock.now_ns, self._line(RTC_IRQ))
        self._port92 = Port92(self.bus, self._wish(GuestWish.RESET))
        KeyboardController(self.bus, self._wish(GuestWish.RESET))
        self.power: AcpiPm | None = None
        if microvm and config.acpi:
            self.power = AcpiPm(self.bus, self._line(PM_IRQ), self._wish(GuestWish.EXIT))
        self.virtio = VirtioBus(ram, config.devices, config.drives, self._line)
        if microvm:
            engine.map_mmio(VIRTIO_BASE, VIRTIO_LENGTH, self.virtio.read, self.virtio.write)
        for device in config.devices:
            self._add(device)
        self._always: tuple[Section, ...] = (self.serial,) if microvm else ()
        self._when_used: tuple[Section, ...] = (
            self._port92,
            *([self.power] if self.power is not None else ()),
            *(() if microvm else (self.serial,)),
        )
        self._unused = {
            section.idstr: encode(section.description, section.save()) for section in self._when_used
        }

    # ---- making them ----

    def _line(self, irq: int) -> Callable[[bool], None]:
        return lambda level: self._engine.set_irq(irq, level)

    def _wish(self, wish: GuestWish) -> Callable[[], None]:
        return lambda: self._on_wish(wish, 0)

    def _make_serial(self, clock: VirtualClock, timers: Timers) -> Serial:
        timeout = timers.timer(lambda: self.serial.receive_timeout())
        output = timers.timer(lambda: self.serial.flush_output())
        self._engine.enable_uart(COM1, COM1_IRQ)
        serial = Serial(
            now_ns=clock.now_ns,
            publish_lsr=self._publish_lsr,
            set_irq=self._line(COM1_IRQ),
            set_timer=timeout.set,
            set_output_timer=output.set,
            fast=self._engine,
        )
        self.bus.add("isa-serial", COM1, COM1_PORTS, serial.read_port, serial.write_port)
        return serial

    def _publish_lsr(self, value: int | None) -> None:
        if value is None:
            self._engine.clear_fast_read(COM1 + LSR_PORT_OFFSET)
        else:
            self._engine.set_fast_read(COM1 + LSR_PORT_OFFSET, value)

    def _add(self, device: DeviceConfig) -> None:
        """A device that -device names; those on the virtio bus are there already."""
        properties = {key: value for key, value in device.properties.items() if isinstance(value, int)}
        if device.driver == "isa-debug-exit":
            DebugExit(self.bus, **properties, on_exit=lambda status: self._on_wish(GuestWish.EXIT, status))
        elif device.driver == "pvpanic":
            Pvpanic(
                self.bus,
                **properties,
                on_panicked=self._wish(GuestWish.PANIC),
                on_crashloaded=self._wish(GuestWish.CRASH_LOADED),
            )

    # ---- driving them ----

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
        self.virtio.quiesce()
