"""The vmdescription record: what the device sections of a stream contain, as JSON for people and tools.

    {"page_size": 4096, "devices": [{"name": "cpu", "instance_id": 0, "vmsd_name": ..., "version": ...,
                                     "fields": [...], "subsections": [...]}, ...]}

Only FULL sections are described, in the order of the stream; `ram` is not. No loader needs this.

Source: QEMU 7.2 migration/savevm.c (qemu_savevm_state_complete_precopy_non_iterable) and its reader,
scripts/analyze-migration.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from vmm.migration import wire
from vmm.migration.stream import VmDescription

__all__ = ["describe_device", "vmdescription"]


def describe_device(idstr: str, instance_id: int, description: dict[str, Any]) -> dict[str, Any]:
    """One member of "devices": the section's name and instance, then what `vmm.vmstate.describe` says."""
    return {"name": idstr, "instance_id": instance_id, **description}


def vmdescription(devices: Iterable[dict[str, Any]]) -> VmDescription:
    """The record, from `describe_device` of each section."""
    text = json.dumps({"page_size": wire.PAGE_SIZE_BYTES, "devices": list(devices)}, separators=(",", ":"))
    return VmDescription(text.encode())
