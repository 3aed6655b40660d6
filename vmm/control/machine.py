"""Handlers of schema/machine.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from qmp.dispatcher import Handler
from vmm.control.interfaces import MachineControl

__all__ = ["handlers", "uuid_text"]

_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
_MACHINES: Final = [
    {
        "name": name,
        "cpu-max": 1,
        "hotpluggable-cpus": False,
        "numa-mem-supported": False,
        "deprecated": False,
        "default-cpu-type": "qemu64-x86_64-cpu",
        "default-ram-id": ram,
    }
    for name, ram in (("microvm", "microvm.ram"), ("none", "ram"))
]


def handlers(machine: MachineControl, cpu_thread_ids: Callable[[], Sequence[int]]) -> dict[str, Handler]:
    """Command name -> handler."""

    def cpus() -> list[dict[str, Any]]:
        return [
            {
                "thread-id": thread_id,
                "qom-path": f"/machine/unattached/device[{index}]",
                "cpu-index": index,
                "target": "x86_64",
            }
            for index, thread_id in enumerate(cpu_thread_ids())
        ]

    def name() -> dict[str, Any]:
        return {} if machine.config.name is None else {"name": machine.config.name}

    return {
        "query-name": lambda call: name(),
        "query-uuid": lambda call: {"UUID": uuid_text(machine)},
        "query-kvm": lambda call: {"enabled": False, "present": False},
        "query-machines": lambda call: [
            {**entry, **({"is-default": True} if entry["name"] == "microvm" else {})} for entry in _MACHINES
        ],
        "query-target": lambda call: {"arch": "x86_64"},
        "query-cpus-fast": lambda call: cpus(),
        "query-memory-size-summary": lambda call: {"base-memory": ram_bytes(machine), "plugged-memory": 0},
    }


def uuid_text(machine: MachineControl) -> str:
    """The guest's UUID as both monitors show it."""
    return _NO_UUID if machine.config.uuid is None else str(machine.config.uuid)


def ram_bytes(machine: MachineControl) -> int:
    """The size of all of guest RAM."""
    return sum(block.length_bytes for block in machine.config.ram)
