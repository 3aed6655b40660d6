"""What is kept for a stock peer: recorded streams loaded, and given back with their clocks advanced."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.recordings import recording
from tools.stream_walk import Item, walk
from vmm.errors import VMStateError
from vmm.migration import stream
from vmm.migration.device_state import DeviceState
from vmm.migration.errors import StreamMismatch
from vmm.migration.kept import KeptState
from vmm.migration.stock_sections import STOCK_SECTIONS
from vmm.vmstate import BytesSource, Description, Field, Values, blank, decode, encode

CLOCK_NS = 5_000_000_000


class Clock:
    """A `timer` section."""

    idstr = "timer"
    instance_id = 0
    description = Description("timer", 1, 1, (Field("cpu_clock_offset", "int64"),))

    def __init__(self) -> None:
        self.now_ns = CLOCK_NS

    def save(self) -> Values:
        return {"cpu_clock_offset": self.now_ns}

    def load(self, values: Values, version: int) -> None:
        self.now_ns = values["cpu_clock_offset"]


def loaded(kept: KeptState, clock: Clock, **sections: Values) -> None:
    """Load these sections, and the clock, through the stream's own way."""
    state = DeviceState([clock], kept)
    descriptions = {each.description.name: each.description for each in STOCK_SECTIONS}
    for number, (name, values) in enumerate({"timer": clock.save(), **sections}.items()):
        description = descriptions.get(name, clock.description)
        record = stream.SectionFull(number, name, 0, description.version)
        body = encode(description, values) + stream.encode(stream.SectionFooter(number))
        state.load(record, BytesSource(body))


def saved(kept: KeptState, clock: Clock) -> dict[str, Values]:
    """What would be sent now."""
    raw = DeviceState([clock], kept).save()
    source = BytesSource(raw)
    found = {}
    descriptions = {each.description.name: each.description for each in STOCK_SECTIONS}
    while source.peek(1):
        record = stream.read_record(source)
        assert isinstance(record, stream.SectionFull)
        description = descriptions.get(record.idstr, clock.description)
        found[record.idstr] = decode(description, source, record.version_id)
        stream.read_footer(source, record.section_id, record.idstr)
    return found


def values_of(name: str, **changes: Any) -> Values:
    description = next(each.description for each in STOCK_SECTIONS if each.description.name == name)
    return {**blank(description), **changes}


def foreign(name: str) -> list[Item]:
    known = {each.description.name for each in STOCK_SECTIONS}
    return [item for item in walk(recording(name)) if item.section.partition("/")[0] in known]


@pytest.mark.parametrize("name", ["microvm-tcg", "microvm-kvm"])
def test_what_came_goes_back_as_it_was_when_no_time_has_passed(name: str) -> None:
    kept, clock = KeptState(), Clock()
    came = {item.section.partition("/")[0]: item.values for item in foreign(name)}
    assert {"fw_cfg", "apic", "ioapic", "kvm-tpr-opt"} <= came.keys()
    loaded(kept, clock, **came)
    sent = saved(kept, clock)
    del sent["timer"]
    assert sent == came


def test_nothing_is_sent_that_did_not_come() -> None:
    assert saved(KeptState(), Clock()).keys() == {"timer"}


def test_the_clock_of_kvm_goes_on() -> None:
    kept, clock = KeptState(), Clock()
    loaded(kept, clock, kvmclock=values_of("kvmclock", clock=1000))
    clock.now_ns += 77
    assert saved(kept, clock)["kvmclock"]["clock"] == 1077


@pytest.mark.parametrize(
    ("spent_ns", "expiry"),
    [(0, 100), (99, 100), (100, 1100), (5000, 5100), (5100, 6100), (10**9, 10**9 + 100)],
)
def test_a_periodic_apic_timer_is_not_replayed(spent_ns: int, expiry: int) -> None:
    kept, clock = KeptState(), Clock()
    came = values_of(
        "apic",
        lvt=[0x30030, 0, 0, 0, 0, 0],  # masked: it counts, and interrupts nobody
        initial_count=499,
        count_shift=1,
        next_time=CLOCK_NS + 100,
        timer_expiry=CLOCK_NS + 100,
    )
    loaded(kept, clock, apic=came)
    clock.now_ns += spent_ns
    sent = saved(kept, clock)["apic"]
    assert sent["timer_expiry"] == sent["next_time"] == CLOCK_NS + expiry


def test_an_apic_timer_that_fires_once_fires_late() -> None:
    kept, clock = KeptState(), Clock()
    times = {"next_time": CLOCK_NS + 100, "timer_expiry": CLOCK_NS + 100}
    came = values_of("apic", lvt=[0x10030, 0, 0, 0, 0, 0], initial_count=499, **times)
    loaded(kept, clock, apic=came)
    clock.now_ns += 10**9
    assert saved(kept, clock)["apic"] == came


def test_a_guest_whose_interrupts_cannot_come_is_refused() -> None:
    kept = KeptState()
    loaded(kept, Clock(), ioapic=values_of("ioapic", ioredtbl=[0x10000] * 24))
    with pytest.raises(VMStateError, match="a controller that there is not here"):
        loaded(kept, Clock(), ioapic=values_of("ioapic", ioredtbl=[0x10000] * 23 + [0x30]))


def test_ramblocks_of_stock_are_taken_and_others_refused() -> None:
    kept = KeptState()
    kept.admit({"pc.bios": 65536, "/rom@etc/table-loader": 4096})
    assert [(block.name, block.length_bytes) for block in kept.blocks] == [
        ("pc.bios", 65536),
        ("/rom@etc/table-loader", 4096),
    ]
    kept.forget()
    assert kept.blocks == ()
    with pytest.raises(
        StreamMismatch, match=r"Unknown ramblock 'vga\.vram'.*one of the machine's, or pc\.bios"
    ):
        kept.admit({"vga.vram": 4096})
    with pytest.raises(StreamMismatch, match=r"pc\.bios.*0x1000000 at most"):
        kept.admit({"pc.bios": (16 << 20) + 4096})
    assert kept.blocks == ()


def test_a_reset_forgets_sections_but_not_the_firmware() -> None:
    kept, clock = KeptState(), Clock()
    kept.admit({"pc.bios": 65536})
    loaded(kept, clock, kvmclock=values_of("kvmclock"))
    kept.forget_sections()
    assert saved(kept, clock).keys() == {"timer"}
    assert len(kept.blocks) == 1
    kept.forget()


def test_what_is_not_known_is_refused_by_name_version_and_place() -> None:
    table = DeviceState([Clock()], KeptState()).table()
    with pytest.raises(StreamMismatch) as refused:
        table.introduce(stream.SectionFull(4, "hpet", 0, 2), 1234)
    text = str(refused.value)
    assert "'hpet' 0" in text
    assert "1234" in text
    assert "version 2" in text
    assert "kvmclock/0" in text
    with pytest.raises(
        StreamMismatch, match=r"unsupported version of section 'apic' 0.*expected 3 to 3, got 4"
    ):
        table.introduce(stream.SectionFull(4, "apic", 0, 4), 1234)
