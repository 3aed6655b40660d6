"""The answers to -help, -version and every `-option help`, made from the tables."""

from __future__ import annotations

from vmm.devices.catalog import DEVICES
from vmm.errors import PageferryError
from vmm.option_syntax import Keys
from vmm.option_table import GROUPS, LOG_ITEMS, MACHINES, OBJECTS

__all__ = ["PACKAGE", "QEMU_VERSION", "HelpRequested"]

QEMU_VERSION = "7.2.22"
"""The version whose interfaces we speak; scripts read it from -version."""

PACKAGE = "pageferry-0.1.0"


class HelpRequested(PageferryError):
    """The user asked for a text."""


def version() -> str:
    """QEMU's line form first, since tools match it, then who we are."""
    return (
        f"QEMU emulator version {QEMU_VERSION} ({PACKAGE})\n"
        "Pageferry 0.1.0, a micro-VM that speaks QEMU's command line, QMP and migration stream\n"
    )


def usage() -> str:
    """All options."""
    lines = ["usage: pageferry [options]", ""]
    for group, options in GROUPS.items():
        lines.append(f"{group}:")
        for option in options:
            names = " or ".join(f"-{name}" for name in (option.name, *option.aliases) if name[:1] != "-")
            lines.append(f"{names} {option.form}".rstrip())
            lines.append(f"                {option.help}")
            lines += [
                f"                {key}={spec.kind:12} {spec.help}".rstrip()
                for key, spec in option.keys.items()
                if spec.help
            ]
        lines.append("")
    return "\n".join(lines)


def keys(owner: str, listed: Keys) -> str:
    """The properties of a machine or device."""
    lines = [f"{owner} options:"]
    lines += [
        f"  {key}=<{spec.kind}>".ljust(34) + f" - {spec.help}" for key, spec in listed.items() if spec.help
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: dict[str, str]) -> str:
    return f"{title}:\n" + "".join(f"{name:20} {text}\n" for name, text in rows.items())


def machines() -> str:
    """-machine help."""
    return _table("Supported machines are", {**MACHINES, "microvm": MACHINES["microvm"] + " (default)"})


def cpus() -> str:
    """-cpu help."""
    return "Available CPUs:\nx86 qemu64                QEMU Virtual CPU version 2.5+\n"


def objects() -> str:
    """-object help."""
    return _table("List of user creatable objects", {f"  {name}": text for name, text in OBJECTS.items()})


def chardevs() -> str:
    """-chardev help."""
    return "Available chardev backend types:\n" + "".join(
        f"  {name}\n" for name in ("file", "null", "socket", "stdio")
    )


def devices() -> str:
    """-device help."""
    rows = (f'name "{name}", bus {device.bus}, desc "{device.help}"\n' for name, device in DEVICES.items())
    return "Devices:\n" + "".join(rows)


def log_items() -> str:
    """-d help."""
    return _table("Log items (comma separated)", LOG_ITEMS)
