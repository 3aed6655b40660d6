"""The two 8259A interrupt controllers: a plain model, and their sections.

They live in the engine, in C (vmm/cpu/pic.c), since the CPU acknowledges an interrupt between two blocks.
`PicPair` says the same in Python; a test drives both with the same accesses.

Source: Intel 8259A data sheet; section `i8259` version 1 and what is left open as in QEMU 7.2
(hw/intc/i8259.c, i8259_common.c).
"""

from __future__ import annotations

from typing import Protocol

from vmm.errors import VMStateError
from vmm.vmstate import Description, Field, Values

__all__ = ["PIC_DESCRIPTION", "PIC_REGISTERS", "PicPair", "PicSection"]

CASCADE = 2
SPURIOUS = 7
ELCR_WRITABLE = (0xF8, 0xDE)
PIC_REGISTERS = (
    "last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll", "special_mask",
    "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode", "init4", "single_mode",
    "elcr",
)  # fmt: skip
PIC_DESCRIPTION = Description("i8259", 1, 1, tuple(Field(name, "uint8") for name in PIC_REGISTERS))
_LIMITS = dict.fromkeys(PIC_REGISTERS, 255) | {"priority_add": 7, "init_state": 3}


class Pic:
    """One controller."""

    def __init__(self, *, is_master: bool) -> None:
        self.is_master = is_master
        self.registers = dict.fromkeys(PIC_REGISTERS, 0)

    def _first(self, inputs: int) -> int:
        """How many inputs have priority over the first of these, 8 if there is none."""
        add = self.registers["priority_add"]
        return next((n for n in range(8) if inputs >> (n + add) % 8 & 1), 8)

    @property
    def wanted(self) -> int | None:
        """The input to be served."""
        r = self.registers
        priority = self._first(r["irr"] & ~r["imr"])
        in_service = r["isr"]
        if r["special_mask"]:
            in_service &= ~r["imr"]
        if r["special_fully_nested_mode"] and self.is_master:
            in_service &= ~(1 << CASCADE)
        return (priority + r["priority_add"]) % 8 if priority < self._first(in_service) else None

    def set_input(self, number: int, level: bool) -> None:
        """The level of one of its eight inputs."""
        r, bit = self.registers, 1 << number
        if level:
            if r["elcr"] & bit or not r["last_irr"] & bit:
                r["irr"] |= bit
            r["last_irr"] |= bit
        else:
            if r["elcr"] & bit:
                r["irr"] &= ~bit
            r["last_irr"] &= ~bit

    def take(self, number: int) -> None:
        """The interrupt of an input is taken by the CPU."""
        r, bit = self.registers, 1 << number
        if not r["auto_eoi"]:
            r["isr"] |= bit
        elif r["rotate_on_auto_eoi"]:
            r["priority_add"] = (number + 1) % 8
        if not r["elcr"] & bit:
            r["irr"] &= ~bit

    def write_command(self, value: int) -> None:
        """ICW1, OCW2 or OCW3, by bits 3 and 4."""
        r = self.registers
        if value & 0x10:  # ICW1
            kept = {"elcr": r["elcr"], "irr": r["irr"] & r["elcr"]}
            r.update(dict.fromkeys(PIC_REGISTERS, 0) | kept)
            r.update(init_state=1, init4=value & 1, single_mode=value >> 1 & 1)
        elif value & 0x08:  # OCW3
            if value & 4:
                r["poll"] = 1
            if value & 2:
                r["read_reg_select"] = value & 1
            if value & 0x40:
                r["special_mask"] = value >> 5 & 1
        else:
            self._end_of_interrupt(value >> 5, value & 7)

    def _end_of_interrupt(self, command: int, number: int) -> None:  # OCW2
        r = self.registers
        if command in (0, 4):
            r["rotate_on_auto_eoi"] = command >> 2
            return
        if command in (1, 5):
            first = self._first(r["isr"])
            if first == 8:
                return
            number = (first + r["priority_add"]) % 8
        if command in (1, 3, 5, 7):
            r["isr"] &= ~(1 << number)
        if command in (5, 6, 7):
            r["priority_add"] = (number + 1) % 8

    def write_data(self, value: int) -> None:
        """The mask (OCW1), or what is next of an initialization (ICW2 to ICW4)."""
        r = self.registers
        match r["init_state"]:
            case 0:
                r["imr"] = value
            case 1:
                r["irq_base"] = value & 0xF8
                r["init_state"] = (3 if r["init4"] else 0) if r["single_mode"] else 2
            case 2:
                r["init_state"] = 3 if r["init4"] else 0
            case _:
                r["special_fully_nested_mode"] = value >> 4 & 1
                r["auto_eoi"] = value >> 1 & 1
                r["init_state"] = 0

    def read(self, port: int) -> int:
        r = self.registers
        if r["poll"]:
            r["poll"] = 0
            wanted = self.wanted
            if wanted is None:
                return 0
            self.take(wanted)
            return 0x80 | wanted
        if port & 1:
            return r["imr"]
        return r["isr"] if r["read_reg_select"] else r["irr"]


class PicPair:
    """Both of them."""

    def __init__(self) -> None:
        self.master, self.slave = Pic(is_master=True), Pic(is_master=False)

    def _of(self, port: int) -> Pic:
        second = port & 1 if port >= 0x4D0 else port >> 7 & 1
        return self.slave if second else self.master

    def _cascade(self) -> None:
        self.master.set_input(CASCADE, self.slave.wanted is not None)

    def set_line(self, irq: int, level: bool) -> None:
        """The level of interrupt line 0 to 15."""
        (self.slave if irq >= 8 else self.master).set_input(irq % 8, level)
        self._cascade()

    @property
    def output(self) -> bool:
        """Does the pair ask the CPU for an interrupt?"""
        return self.master.wanted is not None

    def acknowledge(self) -> int:
        """The vector of the interrupt that the CPU takes now."""
        wanted = self.master.wanted
        if wanted is None:
            return self.master.registers["irq_base"] + SPURIOUS
        vector = self.master.registers["irq_base"] + wanted
        if wanted == CASCADE:
            second = self.slave.wanted
            if second is not None:
                self.slave.take(second)
            vector = self.slave.registers["irq_base"] + (SPURIOUS if second is None else second)
        self.master.take(wanted)
        self._cascade()
        return vector

    def read(self, port: int) -> int:
        if port >= 0x4D0:
            return self._of(port).registers["elcr"]
        value = self._of(port).read(port)
        self._cascade()
        return value

    def write(self, port: int, value: int) -> None:
        pic = self._of(port)
        if port >= 0x4D0:
            pic.registers["elcr"] = value & ELCR_WRITABLE[port & 1]
        elif port & 1:
            pic.write_data(value)
        else:
            pic.write_command(value)
        self._cascade()


class PicRegisters(Protocol):
    """What the engine offers."""

    def get_pics(self) -> tuple[dict[str, int], dict[str, int]]: ...
    def set_pics(self, first: dict[str, int], second: dict[str, int], /) -> None: ...


class PicSection:
    """One controller's section; the first is instance 0."""

    idstr = "i8259"
    description = PIC_DESCRIPTION

    def __init__(self, engine: PicRegisters, instance_id: int) -> None:
        self._engine = engine
        self.instance_id = instance_id

    @property
    def is_used(self) -> bool:
        """Has the guest set it up?"""
        registers = self._engine.get_pics()[self.instance_id]
        return bool(registers["init_state"] or registers["irq_base"] or registers["imr"])

    def save(self) -> Values:
        return dict(self._engine.get_pics()[self.instance_id])

    def load(self, values: Values, version: int) -> None:
        """Raises VMStateError for a state that no 8259A can be in."""
        for name, limit in _LIMITS.items():
            if values[name] > limit:
                where = f"i8259[{self.instance_id}].{name}"
                raise VMStateError(
                    "Impossible register", where, expected=f"at most {limit}", got=values[name]
                )
        pics = list(self._engine.get_pics())
        pics[self.instance_id] = {name: values[name] for name in PIC_REGISTERS}
        self._engine.set_pics(pics[0], pics[1])
