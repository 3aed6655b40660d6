"""The machine's device state in the stream: every section FULL, in the machine's order, and back.

Section ids are the sender's choice; ours are RAM_SECTION_ID for `ram` and then upward, as stock numbers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmm.errors import VMStateError
from vmm.migration.stream import (
    SectionFooter,
    SectionFull,
    SectionTable,
    VmDescription,
    encode,
    read_footer,
)
from vmm.migration.vmdescription import describe_device, vmdescription
from vmm.vmstate import decode, describe, prepare
from vmm.vmstate import encode as encode_fields

if TYPE_CHECKING:
    from vmm.migration.kept import KeptState
    from vmm.vmstate import ByteSource, Section, Values

__all__ = ["RAM_SECTION_ID", "RAM_VERSION", "DeviceState"]

TIMER = "timer"
CLOCK = "cpu_clock_offset"
"""The section and field with the guest's time in ns, while its clock stands still."""

RAM_SECTION_ID = 2
RAM_VERSION = 4
_FIRST_DEVICE_SECTION_ID = 4
"""As stock 7.2 numbers them: 1 and 3 are its block and dirty-bitmap handlers."""


class DeviceState:
    """The sections of one machine, and what it keeps for a peer, to be saved or loaded."""

    def __init__(self, sections: Sequence[Section], kept: KeptState) -> None:
        self._own = tuple(sections)
        self._kept = kept
        everything: tuple[Section, ...] = (*sections, *kept.sections)
        self._sections = {(section.idstr, section.instance_id): section for section in everything}
        self._saved: list[tuple[Section, Values]] = []

    def prepare(self) -> None:
        """What `save` and `load` would do at their first call; the guest may run."""
        for section in self._sections.values():
            prepare(section.description)

    def table(self) -> SectionTable:
        """What a stream for this machine may introduce: `ram` and its devices."""
        versions = {
            key: (section.description.minimum_version, section.description.version)
            for key, section in self._sections.items()
        }
        return SectionTable({("ram", 0): (RAM_VERSION, RAM_VERSION), **versions})

    def save(self) -> bytes:
        """All sections as FULL records. The vCPU must have acknowledged its stop, the devices be quiet."""
        parts = []
        self._saved = self._snapshot()
        for number, (section, values) in enumerate(self._saved, _FIRST_DEVICE_SECTION_ID):
            version = section.description.version
            parts.append(encode(SectionFull(number, section.idstr, section.instance_id, version)))
            parts.append(encode_fields(section.description, values))
            parts.append(encode(SectionFooter(number)))
        return b"".join(parts)

    def _snapshot(self) -> list[tuple[Section, Values]]:
        """Every section with its values; the kept ones behind the CPU, where most of them are in stock.

        Where a device of ours is one that a peer had, too, the guest knows the peer's.
        """
        kept = {section.idstr for section in self._kept.sections if section.came}
        own = [(section, section.save()) for section in self._own if section.idstr not in kept]
        names = [section.idstr for section, _ in own]
        clock_ns = own[names.index(TIMER)][1][CLOCK] if TIMER in names else 0
        at = names.index("cpu") + 1 if "cpu" in names else len(own)
        return [*own[:at], *self._kept.save(clock_ns), *own[at:]]

    def vmdescription(self) -> VmDescription:
        """What `save` has written, for people and tools."""
        return vmdescription(
            describe_device(section.idstr, section.instance_id, describe(section.description, values))
            for section, values in self._saved
        )

    def load(self, record: SectionFull, source: ByteSource) -> None:
        """Read the body and the footer of the section that `record` introduces, and load it.

        Raises:
            StreamError: the body does not fit the section's description, or its footer is not there.
            VMStateError: the values cannot be those of this machine.
        """
        section = self._sections[record.idstr, record.instance_id]
        values = decode(section.description, source, record.version_id)
        read_footer(source, record.section_id, record.idstr)
        if record.idstr == TIMER:
            self._kept.clock_ns = values.get(CLOCK, 0)
        try:
            section.load(values, record.version_id)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise VMStateError("Impossible state", record.idstr, got=str(error)) from error
