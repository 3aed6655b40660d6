"""The vmdescription record."""

from __future__ import annotations

import json

from vmm.migration.stream import VmDescription
from vmm.migration.vmdescription import describe_device, vmdescription
from vmm.vmstate import Description, Field, describe

TIMER = Description("timer", 2, 2, (Field("cpu_ticks_offset", "int64"), Field("unused", "unused", 8)))


def test_a_device_is_named_and_then_described() -> None:
    record = vmdescription([describe_device("timer", 0, describe(TIMER, {"cpu_ticks_offset": 1}))])
    assert isinstance(record, VmDescription)
    shown = json.loads(record.json)
    assert list(shown) == ["page_size", "devices"]
    assert shown["page_size"] == 4096
    (timer,) = shown["devices"]
    assert list(timer)[:4] == ["name", "instance_id", "vmsd_name", "version"]
    assert (timer["name"], timer["instance_id"], timer["vmsd_name"], timer["version"]) == (
        "timer",
        0,
        "timer",
        2,
    )
    assert timer["fields"][0]["name"] == "cpu_ticks_offset"


def test_no_devices() -> None:
    assert json.loads(vmdescription([]).json) == {"page_size": 4096, "devices": []}
