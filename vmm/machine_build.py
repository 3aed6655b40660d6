"""Makes the machine's RAM and reads its boot image, as configured."""

from __future__ import annotations

from vmm.boot.acpi import AcpiConfig, Transport
from vmm.boot.loader import Image, read_boot_sector, read_kernel
from vmm.config import BackendConfig, MachineConfig
from vmm.devices.acpi_pm import PM_IRQ, PM_PORT
from vmm.devices.virtio.bus import places
from vmm.ram import MICROVM_HOLE, GuestRam, RAMBlock, RamKind

__all__ = ["make_ram", "read_image"]


def make_ram(config: MachineConfig) -> GuestRam:
    """The RAMBlocks of `config`. Raises RamError."""
    hole = MICROVM_HOLE if config.machine_type == "microvm" else None
    blocks = [RAMBlock(b.name, b.length_bytes, _ram_kind(b)) for b in config.ram]
    for block in blocks:
        block.use_huge_pages(True)  # fewer faults for the guest, and its pages are found and sent faster
    return GuestRam(blocks, hole)


def _ram_kind(backend: BackendConfig) -> RamKind:
    if not backend.memfd:
        return RamKind.ANONYMOUS
    return RamKind.MEMFD_SHARED if backend.share else RamKind.MEMFD_PRIVATE


def read_image(config: MachineConfig) -> Image | None:
    """The boot image. A destination reads it, too: the guest may reset there. Raises BootError."""
    if config.kernel is not None:
        return read_kernel(config.kernel, _command_line(config), config.initrd, _acpi(config))
    if config.boot_drive is not None:
        return read_boot_sector(config.boot_drive, config.append)
    return None


def _acpi(config: MachineConfig) -> AcpiConfig | None:
    if not config.acpi:
        return None
    transports = [Transport(p.number, p.address, p.length, p.irq) for p in places(config.devices)]
    panic = (device.properties["ioport"] for device in config.devices if device.driver == "pvpanic")
    return AcpiConfig(PM_PORT, PM_IRQ, transports, next((int(port) for port in panic), None))


def _command_line(config: MachineConfig) -> str:
    """-append; without ACPI tables also where the virtio transports are, as stock does."""
    if config.acpi or not config.auto_command_line:
        return config.append
    where = [f"virtio_mmio.device={p.length}@{p.address:#x}:{p.irq}" for p in places(config.devices)]
    return " ".join([config.append, *where] if config.append else where)
