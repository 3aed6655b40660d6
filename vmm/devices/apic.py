"""The local APIC as a stock peer has to see it: a wire for the interrupt controllers, unknown to the guest.

    8259A pair --INT--> LINT0 of the local APIC --ExtINT--> CPU

Here the pair's output goes to the CPU directly. A stock machine whose CPU has an APIC passes it on only if
LINT0 is open, and after its reset it is not. So a guest that uses the pair brings an APIC along as firmware
leaves it ("virtual wire mode"). A guest that has seen one at a peer keeps that one (migration/kept.py).

Sources: Intel SDM vol. 3, 11.5 (Local Vector Table); section `apic` version 3 as in QEMU 7.2
(hw/intc/apic_common.c, apic_accept_pic_intr in hw/intc/apic.c).
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.vmstate import Description, Field, Subsection, Values

__all__ = ["APIC_DESCRIPTION", "LVT_TIMER_PERIODIC", "MASKED", "NO_TIMER", "WireApic"]

LVT_TIMER_PERIODIC = 1 << 17
MASKED = 1 << 16
NO_TIMER = -1
LINT0, LINT1, LVT_ENTRIES = 3, 4, 6
EXTINT, NMI = 0x700, 0x400
BASE, ENABLED, BOOT_CPU = 0xFEE00000, 0x800, 0x100
SPURIOUS, FLAT = 0xFF, 0xF


def _numbers(kind: str, *names: str) -> tuple[Field, ...]:
    return tuple(Field(name, kind) for name in names)


APIC_SIPI = Description("apic_sipi", 1, 1, _numbers("int32", "sipi_vector", "wait_for_sipi"))
APIC_DESCRIPTION = Description(
    "apic",
    3,
    3,
    (
        Field("apicbase", "uint32"),
        *_numbers("uint8", "id", "arb_id", "tpr"),
        Field("spurious_vec", "uint32"),
        *_numbers("uint8", "log_dest", "dest_mode"),
        *(Field(name, "uint32", 8) for name in ("isr", "tmr", "irr")),
        Field("lvt", "uint32", LVT_ENTRIES),
        Field("esr", "uint32"),
        Field("icr", "uint32", 2),
        Field("divide_conf", "uint32"),
        Field("count_shift", "int32"),
        Field("initial_count", "uint32"),
        *_numbers("int64", "initial_count_load_time", "next_time", "timer_expiry"),
    ),
    (Subsection(APIC_SIPI, lambda values: "apic_sipi" in values),),
)


class WireApic:
    """One that passes the interrupt controllers' output on, and that nobody has touched."""

    idstr = "apic"
    instance_id = 0
    description = APIC_DESCRIPTION

    def __init__(self, apic_id: int, is_needed: Callable[[], bool]) -> None:
        """`is_needed`: the guest uses the interrupt controllers."""
        self._apic_id = apic_id
        self._is_needed = is_needed

    @property
    def is_used(self) -> bool:
        """Must a peer see it for the guest to be interrupted there?"""
        return self._is_needed()

    def save(self) -> Values:
        numbers = {field.name: 0 for field in APIC_DESCRIPTION.fields if field.count is None}
        lvt = [MASKED] * LVT_ENTRIES
        lvt[LINT0], lvt[LINT1] = EXTINT, NMI
        return {
            **numbers,
            "apicbase": BASE | ENABLED | BOOT_CPU,
            "id": self._apic_id,
            "spurious_vec": SPURIOUS,
            "dest_mode": FLAT,
            **{name: [0] * 8 for name in ("isr", "tmr", "irr")},
            "lvt": lvt,
            "icr": [0, 0],
            "timer_expiry": NO_TIMER,
        }

    def load(self, values: Values, version: int) -> None:
        """What comes is kept, and checked, by who keeps it; the guest does not see it here."""
