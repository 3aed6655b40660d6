"""The machine's devices on their bus, and what of them travels."""

from __future__ import annotations

import enum
from collections.abc import Callable

from vmm.clock import VirtualClock
from vmm.config import MachineConfig
from vmm.cpu.engine import Engine
from vmm.devices.bus import PortBus
from vmm.devices.control_ports import DebugExit, KeyboardController, Port92, Pvpanic
from vmm.devices.serial import Serial
from vmm.devices.serial_registers import LSR_PORT_OFFSET
from vmm.vmstate import Section, encode

__all__ = ["Devices", "GuestWish"]

COM1 = 0x3F8
COM1_PORTS = 8


class GuestWish(enum.Enum):
    """What a guest asks for through a port; the run ends with it."""

    RESET = "reset"
    EXIT = "exit"
    PANIC = "panic"
    CRASH_LOADED = "crash loaded"


class Devices:
    """Made once; wired to the vCPU by the machine."""

    def __init__(
        self,
        config: MachineConfig,
        engine: Engine,
        clock: VirtualClock,
        on_wish: Callable[[GuestWish, int], None],
    ) -> None:
        """`on_wish` is called on the vCPU's thread. Raises DeviceError."""
        self._engine = engine
        self.bus = PortBus()
        self.serial = Serial(now_ns=clock.now_ns, publish_lsr=self._publish_lsr)
        self.bus.add("isa-serial", COM1, COM1_PORTS, self.serial.read_port, self.serial.write_port)

        def on_reset() -> None:
            on_wish(GuestWish.RESET, 0)

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
        self._always: tuple[Section, ...] = (self.serial,) if config.machine_type == "microvm" else ()
        self._when_used: tuple[Section, ...] = (
            (self._port92,) if config.machine_type == "microvm" else (self._port92, self.serial)
        )
        self._unused = {
            section.idstr: encode(section.description, section.save()) for section in self._when_used
        }

    def reset(self) -> None:
        """As after power-on."""
        self.serial.reset()
        self._port92.reset()

    def sections(self, *, everything: bool) -> list[Section]:
        """See `Machine.sections`."""
        used = [
            section
            for section in self._when_used
            if everything or encode(section.description, section.save()) != self._unused[section.idstr]
        ]
        return [*used, *self._always]

    def quiesce(self, timeout_s: float) -> None:
        """Wait until the serial port's backend has everything, or the time is over."""
        self.serial.sink.wait_flushed(timeout_s)

    def _publish_lsr(self, value: int | None) -> None:
        if value is None:
            self._engine.clear_fast_read(COM1 + LSR_PORT_OFFSET)
        else:
            self._engine.set_fast_read(COM1 + LSR_PORT_OFFSET, value)
