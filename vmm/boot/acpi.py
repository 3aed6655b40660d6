"""The ACPI tables of a Linux guest: how it finds virtio transports, UART and clock, and how it powers off.

    0xe0000 RSDP --> XSDT --> FADT --> FACS, DSDT        all below 0xf0000, where stock has its firmware

The DSDT names what stock microvm's names, with the interrupt lines that stock has with acpi=off, 5 to 12:
there is no MADT, so the guest uses the 8259 pair. For the same reason the FADT is not a hardware-reduced one,
as stock's is: on such Linux leaves the 8259 and the 8254 alone. Without an SMI port the machine is always in
ACPI mode; of the fixed hardware there are the power button and the sleep control (vmm/devices/acpi_pm.py).

Source: ACPI 6.4, 5.2 "ACPI System Description Tables".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vmm.boot import aml
from vmm.boot.elf import Segment

__all__ = ["AcpiConfig", "Transport", "acpi_tables"]

RSDP_ADDRESS = 0xE0000
FACS_ADDRESS = 0xE0040
TABLES_ADDRESS = 0xE0080
OEM, OEM_TABLE = b"PAGEFY", b"PAGEFERY"
CREATOR = b"PGFY"
HEADER = struct.Struct("<4sIBB6s8sI4sI")
FACS_BYTES = 64
FADT_REVISION = 3
FLAG_WBINVD, FLAG_C1, FLAG_NO_SLEEP_BUTTON, FLAG_NO_RTC_WAKE = 1 << 0, 1 << 2, 1 << 5, 1 << 6
FLAG_RESET_REGISTER = 1 << 10
BOOT_LEGACY_DEVICES, BOOT_NO_VGA = 1 << 0, 1 << 2
IO_SPACE = 1
BYTE_ACCESS, WORD_ACCESS = 1, 2
RESET_PORT, RESET_VALUE = 0x64, 0xFE
PRESENT = 0xF
S5_TYPE = 5


@dataclass(frozen=True)
class Transport:
    """A virtio-mmio transport with a device on it."""

    number: int
    address: int
    length: int
    irq: int


@dataclass(frozen=True)
class AcpiConfig:
    """What differs between machines. `pm_port` has the event block, and four ports on the control block."""

    pm_port: int
    sci_irq: int
    transports: Sequence[Transport] = ()
    panic_port: int | None = None


def acpi_tables(config: AcpiConfig) -> tuple[Segment, int]:
    """All tables in one piece, and the address of the RSDP."""
    dsdt = _table(b"DSDT", 2, _devices(config))
    dsdt_at = TABLES_ADDRESS
    fadt = _table(b"FACP", FADT_REVISION, _fadt(config, dsdt_at))
    fadt_at = _align(dsdt_at + len(dsdt))
    xsdt = _table(b"XSDT", 1, struct.pack("<Q", fadt_at))
    xsdt_at = _align(fadt_at + len(fadt))
    image = bytearray(xsdt_at + len(xsdt) - RSDP_ADDRESS)
    rsdp = _rsdp(xsdt_at)
    facs = struct.pack("<4sI", b"FACS", FACS_BYTES) + bytes(24) + b"\x02" + bytes(31)
    for address, data in (
        (RSDP_ADDRESS, rsdp), (FACS_ADDRESS, facs), (dsdt_at, dsdt), (fadt_at, fadt), (xsdt_at, xsdt),
    ):  # fmt: skip
        image[address - RSDP_ADDRESS : address - RSDP_ADDRESS + len(data)] = data
    return Segment(RSDP_ADDRESS, bytes(image), len(image)), RSDP_ADDRESS


def _align(address: int) -> int:
    return (address + 15) & -16


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = HEADER.size + len(body)
    table = bytearray(HEADER.pack(signature, length, revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1) + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt_at: int) -> bytes:
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM, 2, 0, 36, xsdt_at, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _register(port: int, bits: int, access: int) -> bytes:
    """A generic address: these ports, or none."""
    return struct.pack("<BBBBQ", IO_SPACE, bits, 0, access, port) if port else bytes(12)


def _fadt(config: AcpiConfig, dsdt_at: int) -> bytes:
    flags = FLAG_WBINVD | FLAG_C1 | FLAG_NO_SLEEP_BUTTON | FLAG_NO_RTC_WAKE | FLAG_RESET_REGISTER
    events, control = config.pm_port, config.pm_port + 4
    body = struct.pack("<II", FACS_ADDRESS, dsdt_at)
    body += struct.pack("<BBHIBBBB", 0, 0, config.sci_irq, 0, 0, 0, 0, 0)
    body += struct.pack("<8I", events, 0, control, 0, 0, 0, 0, 0)
    body += struct.pack("<8B", 4, 2, 0, 0, 0, 0, 0, 0)
    body += struct.pack("<HHHHBBBBB", 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0, 0, 0x32)  # C2, C3: none; century
    body += struct.pack("<HBI", BOOT_LEGACY_DEVICES | BOOT_NO_VGA, 0, flags)
    body += _register(RESET_PORT, 8, BYTE_ACCESS) + struct.pack("<B3x", RESET_VALUE)
    body += struct.pack("<QQ", 0, dsdt_at)
    body += _register(events, 32, WORD_ACCESS) + _register(0, 0, 0)
    body += _register(control, 16, WORD_ACCESS) + _register(0, 0, 0)
    return body + 4 * _register(0, 0, 0)


def _devices(config: AcpiConfig) -> bytes:
    devices = [
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_STA", aml.integer(PRESENT)),
            aml.name("_CRS", aml.resources(aml.io_ports(0x3F8, 8), aml.irq_no_flags(4))),
        ),
        aml.device(
            "RTC",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resources(aml.io_ports(0x70, 2), aml.irq_no_flags(8))),
        ),
        *(_transport(transport) for transport in config.transports),
    ]
    if config.panic_port is not None:
        devices.append(_panic_device(config.panic_port))
    s5 = aml.package(*(aml.integer(value) for value in (S5_TYPE, S5_TYPE, 0, 0)))
    return aml.scope("_SB", *devices) + aml.name("\\_S5", s5)


def _panic_device(port: int) -> bytes:
    """As QEMU's docs/specs/pvpanic.txt; its `isa` bridge is not needed to find it."""
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_STA", aml.integer(PRESENT)),
        aml.name("_CRS", aml.resources(aml.io_ports(port, 1))),
    )


def _transport(transport: Transport) -> bytes:
    return aml.device(
        f"VR{transport.number:02}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(transport.number)),
        aml.name("_CCA", aml.integer(1)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.memory32_fixed(transport.address, transport.length), aml.interrupt(transport.irq)
            ),
        ),
    )
