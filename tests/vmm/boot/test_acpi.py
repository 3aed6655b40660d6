"""The ACPI tables: checksums, where they point, and the machine code against Intel's own disassembler."""

from __future__ import annotations

import pathlib
import shutil
import struct
import subprocess

import pytest

from vmm.boot import aml
from vmm.boot.acpi import AcpiConfig, Transport, acpi_tables

TRANSPORTS = tuple(Transport(n, 0xFEB00000 + n * 0x200, 0x200, 5 + n) for n in (7, 6, 3))


def tables(transports: tuple[Transport, ...] = TRANSPORTS) -> dict[bytes, bytes]:
    """By signature, found from the RSDP on as an operating system finds them."""
    segment, rsdp_at = acpi_tables(AcpiConfig(0x600, 14, transports))

    def at(address: int, length: int) -> bytes:
        offset = address - segment.guest_address
        assert 0 <= offset <= len(segment.data) - length
        return segment.data[offset : offset + length]

    def table(address: int) -> bytes:
        return at(address, struct.unpack("<I", at(address + 4, 4))[0])

    rsdp = at(rsdp_at, 36)
    assert (rsdp_at % 16, sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0, 0)
    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    (fadt_at,) = struct.unpack_from("<Q", xsdt, 36)
    fadt = table(fadt_at)
    found = {b"XSDT": xsdt, b"FACP": fadt}
    for offset in (36, 40):
        data = table(struct.unpack_from("<I", fadt, offset)[0])
        found[data[:4]] = data
    return found


def test_the_tables_are_found_and_their_sums_are_right() -> None:
    found = tables()
    assert set(found) == {b"XSDT", b"FACP", b"FACS", b"DSDT"}
    for signature, data in found.items():
        assert data[:4] == signature
        assert signature == b"FACS" or sum(data) & 0xFF == 0


def test_the_fixed_hardware() -> None:
    fadt = tables()[b"FACP"]
    assert len(fadt) == 244, "ACPI 2.0 and later"
    sci, smi = struct.unpack_from("<HI", fadt, 46)
    events, control = struct.unpack_from("<I4xI", fadt, 56)
    assert (sci, smi, events, control) == (14, 0, 0x600, 0x604)
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert not flags & 1 << 20, "not hardware-reduced: Linux would leave the 8259 alone"


@pytest.mark.parametrize("length", [0, 10, 61, 62, 63, 64, 4000, 5000, 70000])
def test_lengths_count_themselves(length: int) -> None:
    data = aml._package_length(length)
    size = data[0] if len(data) == 1 else data[0] & 0xF | int.from_bytes(data[1:], "little") << 4
    assert size == length + len(data)
    assert len(data) == 1 + (data[0] >> 6)


@pytest.mark.parametrize(
    ("value", "data"),
    [(0, b"\0"), (1, b"\1"), (2, b"\x0a\2"), (256, b"\x0b\0\1"), (1 << 20, b"\x0c\0\0\x10\0")],
)
def test_integers(value: int, data: bytes) -> None:
    assert aml.integer(value) == data


def test_the_names_of_boards() -> None:
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"


def test_each_transport_is_there_with_its_address_and_interrupt() -> None:
    dsdt = tables()[b"DSDT"]
    assert dsdt.count(b"LNRO0005\0") == 3
    for transport in TRANSPORTS:
        memory, line = aml.memory32_fixed(transport.address, 0x200), aml.interrupt(transport.irq)
        assert memory + line in dsdt


def test_the_disassembler_understands_it(tmp_path: pathlib.Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("iasl is not installed (apt-get install acpica-tools)")
    (tmp_path / "dsdt.aml").write_bytes(tables()[b"DSDT"])
    subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "dsdt.dsl").read_text()
    for part in ("Device (VR07)", "0xFEB00E00", "0x0000000C", 'EisaId ("PNP0501")', "S5 System State"):
        assert part in text
