"""Sections of stock QEMU's `microvm` that no device of ours has, as tables: read, kept, and given back.

The names, types and order are those of stock's own vmdescription, and a test compares them. What a section
says of time has an `advance`: a guest that has spent time here must not live that time again at the peer.

    (values as they came, the guest's clock now in ns, ns of the guest's time since they came) -> None

Sources: QEMU 7.2 hw/intc/apic_common.c, hw/i386/kvmvapic.c, hw/intc/ioapic_common.c, hw/nvram/fw_cfg.c,
hw/i386/kvm/clock.c, hw/acpi/generic_event_device.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.devices.apic import APIC_DESCRIPTION, LVT_TIMER_PERIODIC, MASKED, NO_TIMER
from vmm.vmstate import Description, Field, Subsection, Values

__all__ = ["STOCK_BLOCKS", "STOCK_SECTIONS", "StockSection", "interrupts_in_use"]

STOCK_BLOCKS = {
    "pc.bios": 16 << 20,
    "/rom@etc/acpi/tables": 2 << 20,
    "/rom@etc/table-loader": 1 << 20,
    "/rom@etc/acpi/rsdp": 1 << 20,
}
"""RAMBlocks of stock's `microvm` that the guest's RAM is not part of: name -> the longest taken, in bytes.

The limits are stock's own (16 MiB of firmware is what `-bios` takes, the others are the resizable maximum or
far above it).
"""


def _numbers(kind: str, *names: str) -> tuple[Field, ...]:
    return tuple(Field(name, kind) for name in names)


def _optional(name: str, version: int, *fields: Field) -> Subsection:
    return Subsection(Description(name, version, version, fields), lambda values: name in values)


def _keep(values: Values, now_ns: int, elapsed_ns: int) -> None:
    """Nothing in it says what time it is."""


@dataclass(frozen=True)
class StockSection:
    """One section that stock may send: its instance, its table, and what time does to it."""

    instance_id: int
    description: Description
    advance: Callable[[Values, int, int], None] = _keep


def _next_period(at_ns: int, period_ns: int, now_ns: int) -> int:
    """The first of at, at + period, at + 2 period ... that is not over."""
    return at_ns if at_ns > now_ns else at_ns + ((now_ns - at_ns) // period_ns + 1) * period_ns


# ---- local APIC


def _advance_apic(values: Values, now_ns: int, elapsed_ns: int) -> None:
    # Its times are on the guest's clock, which goes on with the `timer` section. A periodic timer would fire
    # at the peer once for each period spent here, all at once; one that fires once does so there.
    shift = values["count_shift"]
    if values["timer_expiry"] == NO_TIMER or not values["lvt"][0] & LVT_TIMER_PERIODIC or not 0 <= shift < 64:
        return
    period_ns = (values["initial_count"] + 1) << shift
    values["next_time"] = _next_period(values["next_time"], period_ns, now_ns)
    values["timer_expiry"] = _next_period(values["timer_expiry"], period_ns, now_ns)


VAPIC_HANDLERS = Description(
    "kvmvapic-handlers",
    1,
    1,
    (
        *_numbers("uint32", "set_tpr", "set_tpr_eax"),
        Field("get_tpr", "uint32", 8),
        Field("get_tpr_stack", "uint32"),
    ),
)
VAPIC_ROM = Description(
    "kvmvapic-guest-rom",
    1,
    1,
    (
        Field("unused", "unused", 8),
        *_numbers("uint32", "vaddr", "fixup_start", "fixup_end", "vapic_vaddr", "vapic_size", "vcpu_shift"),
        Field("real_tpr_addr", "uint32"),
        Field("up", "struct", struct=VAPIC_HANDLERS),
        Field("mp", "struct", struct=VAPIC_HANDLERS),
    ),
)
TPR_OPT = Description(
    "kvm-tpr-opt",
    1,
    1,
    (
        Field("rom_state", "struct", struct=VAPIC_ROM),
        *_numbers("uint32", "state", "real_tpr_addr", "rom_state_vaddr", "vapic_paddr", "rom_state_paddr"),
    ),
)

IOAPIC = Description(
    "ioapic",
    3,
    1,
    (
        *_numbers("uint8", "id", "ioregsel"),
        Field("unused", "unused", 8, since=2),
        Field("irr", "uint32", since=2),
        Field("ioredtbl", "uint64", 24),
    ),
)

# ---- firmware configuration, power and the clock of KVM

FW_CFG = Description(
    "fw_cfg",
    2,
    2,
    (Field("cur_entry", "uint16"), Field("cur_offset[1]", "uint32")),
    (
        _optional("fw_cfg/dma", 0, Field("dma_addr", "uint64")),
        _optional(
            "fw_cfg/acpi_mr", 1, *_numbers("uint64", "table_mr_size", "linker_mr_size", "rsdp_mr_size")
        ),
    ),
)

ACPI_GED = Description(
    "acpi-ged",
    1,
    1,
    (Field("ged_state", "struct", struct=Description("acpi-ged-state", 1, 1, _numbers("uint32", "sel"))),),
    (
        _optional(
            "acpi-ged/memhp",
            1,
            Field(
                "memhp_state",
                "struct",
                struct=Description("memory hotplug state", 1, 1, _numbers("uint32", "selector")),
            ),
        ),
    ),
)


def _advance_kvmclock(values: Values, now_ns: int, elapsed_ns: int) -> None:
    values["clock"] = (values["clock"] + elapsed_ns) % (1 << 64)


KVMCLOCK = Description(
    "kvmclock",
    1,
    1,
    (Field("clock", "uint64"),),
    (_optional("kvmclock/clock_is_reliable", 1, Field("clock_is_reliable", "bool")),),
)

STOCK_SECTIONS = (
    StockSection(0, FW_CFG),
    StockSection(0, TPR_OPT),
    StockSection(0, APIC_DESCRIPTION, _advance_apic),
    StockSection(0, IOAPIC),
    StockSection(1, IOAPIC),
    StockSection(0, ACPI_GED),
    StockSection(0, KVMCLOCK, _advance_kvmclock),
)
"""What may come from a stock `microvm` with one vCPU, in its order; `idstr` is the description's name."""


def interrupts_in_use(idstr: str, values: Values) -> bool:
    """Does the guest wait for interrupts of this device, which it cannot get here?"""
    if idstr == "apic":
        return bool(values["timer_expiry"] != NO_TIMER and not values["lvt"][0] & MASKED)
    if idstr == "ioapic":
        return any(not entry & MASKED for entry in values["ioredtbl"])
    return False
