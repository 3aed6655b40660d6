"""The transports of a machine, as stock microvm with acpi=off has them, and which device is where.

    transport n    guest physical 0xfeb00000 + n * 0x200, interrupt line 5 + n, n = 0 .. 7

The first -device gets the last transport, as in QEMU. One page of registers holds them all. Transport 3 has
the clock's line, which Linux gives to the clock's driver alone: it stays empty. The fifth device is on
transport 2, where stock QEMU puts it only if told to (`bus=virtio-mmio-bus.2`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.config import DeviceConfig, DriveConfig
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.disk import RawDisk
from vmm.devices.virtio.rng import VirtioRng
from vmm.devices.virtio.state import VirtioSection
from vmm.devices.virtio.transport import MmioTransport
from vmm.errors import DeviceError
from vmm.ram import GuestRam

__all__ = [
    "TRANSPORTS",
    "VIRTIO_BASE",
    "VIRTIO_DRIVERS",
    "VIRTIO_LENGTH",
    "DiskInfo",
    "Place",
    "VirtioBus",
    "places",
]

TRANSPORTS = 8
VIRTIO_BASE, STRIDE = 0xFEB00000, 0x200
VIRTIO_LENGTH = TRANSPORTS * STRIDE
FIRST_IRQ, RTC_IRQ = 5, 8
VIRTIO_DRIVERS = ("virtio-blk-device", "virtio-rng-device", "virtio-serial-device")
"""The drivers that take a transport; virtconsole is a port of virtio-serial-device."""


@dataclass(frozen=True)
class Place:
    """Where a transport is."""

    number: int

    @property
    def address(self) -> int:
        """Its registers, guest physical."""
        return VIRTIO_BASE + self.number * STRIDE

    @property
    def length(self) -> int:
        """Of its registers, in bytes."""
        return STRIDE

    @property
    def irq(self) -> int:
        """Its interrupt line."""
        return FIRST_IRQ + self.number


def places(devices: tuple[DeviceConfig, ...]) -> list[Place]:
    """Of the virtio devices among these, in their order. Raises DeviceError if they are too many."""
    count = sum(device.driver in VIRTIO_DRIVERS for device in devices)
    free = [place for place in map(Place, reversed(range(TRANSPORTS))) if place.irq != RTC_IRQ]
    if count > len(free):
        raise DeviceError(f"There are {len(free)} virtio transports for devices, not {count}")
    return free[:count]


@dataclass(frozen=True)
class DiskInfo:
    """A disk as query-block shows it."""

    id: str
    qom_path: str
    path: str
    read_only: bool
    length_bytes: int
    write_cache: bool


class VirtioBus:
    """All transports; the vCPU's thread calls `read` and `write`."""

    def __init__(
        self,
        ram: GuestRam,
        devices: tuple[DeviceConfig, ...],
        drives: tuple[DriveConfig, ...],
        line: Callable[[int], Callable[[bool], None]],
    ) -> None:
        """`line(irq)` gives who sets the level of an interrupt line. Raises DeviceError."""
        self.console: VirtioConsole | None = None
        self.disks: dict[str, VirtioBlock] = {}
        """By the id of the drive."""
        self.devices: list[VirtioDevice] = []
        self.sections: list[VirtioSection] = []
        self._transports = [MmioTransport() for _ in range(TRANSPORTS)]
        by_id = {drive.id: drive for drive in drives}
        wanted = [device for device in devices if device.driver in VIRTIO_DRIVERS]
        for config, place in zip(wanted, places(devices), strict=True):
            device = self._make(ram, config, by_id)
            device.set_irq = line(place.irq)
            transport = self._transports[place.number] = MmioTransport(device)
            self.devices.append(device)
            self.sections.append(VirtioSection(transport, device, place.address))

    def _make(self, ram: GuestRam, config: DeviceConfig, drives: dict[str, DriveConfig]) -> VirtioDevice:
        if config.driver == "virtio-rng-device":
            return VirtioRng(ram)
        if config.driver == "virtio-serial-device":
            self.console = VirtioConsole(ram)
            return self.console
        drive = drives[str(config.properties["drive"])]
        disk = RawDisk(drive.path, read_only=drive.read_only)
        block = self.disks[drive.id] = VirtioBlock(ram, disk, str(config.properties.get("serial", "")))
        return block

    def describe_disks(self) -> list[DiskInfo]:
        """All of them, in the order of their devices. Any thread; does not wait."""
        found = []
        for name, block in self.disks.items():
            path = f"/machine/peripheral-anon/device[{self.devices.index(block)}]"
            disk = block.disk
            info = DiskInfo(name, path, disk.path, disk.read_only, disk.length_bytes, block.write_cache)
            found.append(info)
        return found

    def read(self, address: int, size: int) -> int:
        """A load from the page of registers."""
        number, offset = divmod(address - VIRTIO_BASE, STRIDE)
        return self._transports[number].read(offset, size)

    def write(self, address: int, size: int, value: int) -> None:
        """A store to it."""
        number, offset = divmod(address - VIRTIO_BASE, STRIDE)
        self._transports[number].write(offset, size, value)

    def reset(self) -> None:
        """As after power-on. Waits for requests under way."""
        for transport in self._transports:
            if transport.device is not None:
                transport.device.reset()
                transport.clear()

    def pause(self) -> None:
        """Begin no request any more."""
        for device in self.devices:
            device.pause()

    def resume(self) -> None:
        """Begin requests again."""
        for device in self.devices:
            device.resume()

    def wait_idle(self, timeout_s: float | None) -> bool:
        """After `pause`: have all requests under way ended? Then no device writes to RAM."""
        return all(device.wait_idle(timeout_s) for device in self.devices)

    def quiesce(self) -> None:
        """After `pause` and `wait_idle`, before the last look at RAM: disks are ready to go elsewhere.

        What the guest has written to them is on the medium. Raises OSError.
        """
        for block in self.disks.values():
            block.begin_all()
            block.disk.flush()

    def close(self, timeout_s: float | None) -> bool:
        """End the threads; False if one did not end, and then its disk stays open."""
        ended = True
        for device in self.devices:
            ended = device.close(timeout_s) and ended
        if ended:
            for block in self.disks.values():
                block.disk.close()
        return ended
