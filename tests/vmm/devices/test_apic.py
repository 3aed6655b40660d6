"""The APIC that a stock peer is told of lets the interrupt controllers through, and nothing else."""

from __future__ import annotations

import pytest

from vmm.devices.apic import APIC_DESCRIPTION, MASKED, WireApic
from vmm.errors import VMStateError
from vmm.migration.kept import KeptSection
from vmm.migration.stock_sections import STOCK_SECTIONS
from vmm.vmstate import BytesSource, Values, decode, encode

STOCK_BYTES = 181
LINT0 = 3


def kept(idstr: str) -> KeptSection:
    (section,) = (each for each in STOCK_SECTIONS if each.description.name == idstr and not each.instance_id)
    return KeptSection(section)


def ioapic(entry: int) -> Values:
    return {"id": 0, "ioregsel": 0, "unused": None, "irr": 0, "ioredtbl": [MASKED] * 23 + [entry]}


def test_it_is_a_wire_in_stocks_layout() -> None:
    used = False
    apic = WireApic(3, lambda: used)
    assert not apic.is_used
    used = True
    assert apic.is_used
    data = encode(APIC_DESCRIPTION, apic.save())
    assert len(data) == STOCK_BYTES
    values = decode(APIC_DESCRIPTION, BytesSource(data), 3)
    assert values["id"] == 3
    assert values["lvt"][LINT0] == 0x700, "ExtINT, not masked"
    assert [entry for number, entry in enumerate(values["lvt"]) if number not in (LINT0, 4)] == [MASKED] * 4


def test_a_guest_that_uses_the_controllers_is_taken() -> None:
    section = kept("apic")
    section.load(WireApic(0, lambda: True).save(), 3)
    assert section.came
    kept("ioapic").load(ioapic(MASKED), 3)


def test_a_guest_that_waits_for_an_apic_is_refused_with_the_reason() -> None:
    values = WireApic(0, lambda: True).save()
    values["lvt"][0], values["timer_expiry"] = 0xEC, 5
    with pytest.raises(VMStateError, match="waits for interrupts of a controller that there is not here"):
        kept("apic").load(values, 3)
    with pytest.raises(VMStateError, match="noapic nolapic"):
        kept("ioapic").load(ioapic(0x30), 3)
