"""What `-device` accepts: drivers, their properties and the defaults, as QEMU names them. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from vmm.option_syntax import Key

__all__ = ["DEVICES", "DeviceType"]


@dataclass(frozen=True)
class DeviceType:
    """One driver. A property without a default is optional."""

    bus: str
    help: str
    keys: dict[str, Key]
    defaults: dict[str, int | str | bool]


DEVICES: dict[str, DeviceType] = {
    "isa-serial": DeviceType(
        "ISA",
        "16550A UART; COM1 is always there, this names its backend",
        {
            "chardev": Key("text", "id of the character backend"),
            "iobase": Key("number", "first port"),
            "irq": Key("number", "interrupt line"),
            "index": Key("number", "0 is COM1"),
        },
        {"iobase": 0x3F8, "irq": 4, "index": 0},
    ),
    "isa-debug-exit": DeviceType(
        "ISA",
        "ends the process with exit status (value << 1) | 1 when the guest writes to its port",
        {"iobase": Key("number", "first port"), "iosize": Key("number", "how many ports (1, 2 or 4)")},
        {"iobase": 0x501, "iosize": 2},
    ),
    "pvpanic": DeviceType(
        "ISA",
        "tells of guest panics",
        {
            "ioport": Key("number", "port"),
            "events": Key("number", "mask of the events: 1 panicked, 2 crash loaded"),
        },
        {"ioport": 0x505, "events": 3},
    ),
    "virtio-rng-device": DeviceType("virtio-bus", "bytes from the host's random number generator", {}, {}),
    "virtio-blk-device": DeviceType(
        "virtio-bus",
        "disk; its image is a -drive with if=none",
        {
            "drive": Key("text", "id of the drive"),
            "serial": Key("text", "the disk's serial number, up to 20 bytes"),
        },
        {},
    ),
    "virtio-serial-device": DeviceType("virtio-bus", "31 ports, of which one can be a console", {}, {}),
    "virtconsole": DeviceType(
        "virtio-serial-bus",
        "console on a virtio-serial-device (hvc0 in Linux)",
        {"chardev": Key("text", "id of the character backend"), "nr": Key("number", "port, must be 0")},
        {},
    ),
}
