"""`info ...` of the human monitor: a function from what the queries give to text, for each subcommand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmm.control.absent import no_balloon
from vmm.control.interfaces import MachineControl, MigratorControl
from vmm.control.machine import ram_bytes, uuid_text
from vmm.control.run_state import status
from vmm.migration.params import PARAMETERS

__all__ = ["SUBCOMMANDS", "InfoSources", "capabilities_text", "parameters_text"]


@dataclass(frozen=True)
class InfoSources:
    """What the subcommands ask."""

    machine: MachineControl
    migrator: MigratorControl
    version: dict[str, Any]
    cpu_thread_ids: Callable[[], Sequence[int]]
    chardevs: Callable[[], list[dict[str, Any]]]


def _status(sources: InfoSources) -> str:
    state = status(sources.machine, sources.migrator)
    where = f" [{state['x-vcpu']}]" if "x-vcpu" in state else ""
    if state["status"] == "running":
        return f"VM status: running{where}\n"
    why = "" if state["status"] == "paused" else f" ({state['status']})"
    return f"VM status: paused{why}{where}\n"


def _name(sources: InfoSources) -> str:
    name = sources.machine.config.name
    return "" if name is None else f"{name}\n"


def _version(sources: InfoSources) -> str:
    qemu = sources.version["qemu"]
    return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}{sources.version['package']}\n"


def _chardev(sources: InfoSources) -> str:
    return "".join(f"{each['label']}: filename={each['filename']}\n" for each in sources.chardevs())


def _cpus(sources: InfoSources) -> str:
    return "".join(
        f"{' ' if index else '*'} CPU #{index}: thread_id={thread_id}\n"
        for index, thread_id in enumerate(sources.cpu_thread_ids())
    )


def _memory(sources: InfoSources) -> str:
    return f"base memory: {ram_bytes(sources.machine)}\nplugged memory: 0\n"


def capabilities_text(states: list[dict[str, Any]]) -> str:
    """Of the reply of query-migrate-capabilities."""
    return "".join(f"{each['capability']}: {'on' if each['state'] else 'off'}\n" for each in states)


def parameters_text(values: Mapping[str, Any]) -> str:
    """Of the reply of query-migrate-parameters: each with its unit."""
    return "".join(
        f"{name}: {parameter.show(values[name])}\n"
        for name, parameter in PARAMETERS.items()
        if name in values
    )


_GLOBALS: Final = """\
globals:
store-global-state: on
only-migratable: off
send-configuration: on
send-section-footer: on
decompress-error-check: on
clear-bitmap-shift: 18
"""

# (label, member of MigrationInfo, unit)
_TIMES: Final = (
    ("total time", "total-time", " ms"),
    ("expected downtime", "expected-downtime", " ms"),
    ("downtime", "downtime", " ms"),
    ("setup", "setup-time", " ms"),
)
# (label, member of MigrationStats, divisor, unit, shown if 0)
_RAM: Final = (
    ("transferred ram", "transferred", 1024, " kbytes", True),
    ("throughput", "mbps", 0, " mbps", True),
    ("remaining ram", "remaining", 1024, " kbytes", True),
    ("total ram", "total", 1024, " kbytes", True),
    ("duplicate", "duplicate", 1, " pages", True),
    ("skipped", "skipped", 1, " pages", True),
    ("normal", "normal", 1, " pages", True),
    ("normal bytes", "normal-bytes", 1024, " kbytes", True),
    ("dirty sync count", "dirty-sync-count", 1, "", True),
    ("page size", "page-size", 1024, " kbytes", True),
    ("multifd bytes", "multifd-bytes", 1024, " kbytes", True),
    ("pages-per-second", "pages-per-second", 1, "", True),
    ("dirty pages rate", "dirty-pages-rate", 1, " pages", False),
    ("postcopy request count", "postcopy-requests", 1, "", False),
    ("precopy ram", "precopy-bytes", 1024, " kbytes", False),
    ("downtime ram", "downtime-bytes", 1024, " kbytes", False),
    ("postcopy ram", "postcopy-bytes", 1024, " kbytes", False),
)


def _migrate(sources: InfoSources) -> str:
    info = sources.migrator.query()
    lines = [_GLOBALS]
    if "blocked-reasons" in info:
        lines.append("Outgoing migration blocked:\n")
        lines += [f"  {reason}\n" for reason in info["blocked-reasons"]]
    if "status" in info:
        why = f" ({info['error-desc']})" if "error-desc" in info else ""
        lines.append(f"Migration status: {info['status']}{why}\n")
    lines += [f"{label}: {info[key]}{unit}\n" for label, key, unit in _TIMES if key in info]
    if "ram" in info:
        lines += _ram_lines(info["ram"])
    if "cpu-throttle-percentage" in info:
        lines.append(f"cpu throttle percentage: {info['cpu-throttle-percentage']}\n")
    if "postcopy-blocktime" in info:
        lines.append(f"postcopy blocktime: {info['postcopy-blocktime']}\n")
    addresses = info.get("socket-address", [])
    if addresses:
        lines.append("socket address: [\n")
        lines += [f"\t{_address(address)}\n" for address in addresses]
        lines.append("]\n")
    return "".join(lines)


def _ram_lines(ram: dict[str, Any]) -> list[str]:
    lines = []
    for label, key, divisor, unit, always in _RAM:
        value = ram.get(key, 0)
        if value or always:
            shown = f"{value:.2f}" if divisor == 0 else str(value // divisor)
            lines.append(f"{label}: {shown}{unit}\n")
    return lines


def _address(address: dict[str, Any]) -> str:
    if address["type"] == "inet":
        return f"tcp:{address['host']}:{address['port']}"
    return f"{address['type']}:{address.get('path', address.get('str', ''))}"


SUBCOMMANDS: Final[list[tuple[str, str, Callable[[InfoSources], str]]]] = [
    ("balloon", "show balloon information", lambda sources: no_balloon()),
    ("chardev", "show the character devices", _chardev),
    ("cpus", "show infos for each CPU", _cpus),
    ("kvm", "show KVM information", lambda sources: "kvm support: disabled\n"),
    (
        "memory_size_summary",
        "show the amount of initially allocated and present hotpluggable (if enabled) memory in bytes.",
        _memory,
    ),
    ("migrate", "show migration status", _migrate),
    (
        "migrate_capabilities",
        "show current migration capabilities",
        lambda sources: capabilities_text(sources.migrator.query_capabilities()),
    ),
    (
        "migrate_parameters",
        "show current migration parameters",
        lambda sources: parameters_text(sources.migrator.query_parameters()),
    ),
    ("name", "show the current VM name", _name),
    ("status", "show the current VM status (running|paused)", _status),
    ("uuid", "show the current VM UUID", lambda sources: f"{uuid_text(sources.machine)}\n"),
    ("version", "show the version of QEMU", _version),
]
