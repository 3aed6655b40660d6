"""What a machine and its process are to be, as plain values: the command line in, everything else reads it.

Nothing here is checked; `vmm.options` makes only values that fit together. Units are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from uuid import UUID  # its import takes as long as all options

__all__ = [
    "ActionConfig",
    "BackendConfig",
    "ChardevConfig",
    "DeviceConfig",
    "DirtyLogRung",
    "DriveConfig",
    "HttpConfig",
    "LogConfig",
    "MachineConfig",
    "MonitorConfig",
    "Settings",
]

MIB = 1 << 20

DirtyLogRung = Literal["auto", "engine", "async", "sync"]


@dataclass(frozen=True)
class BackendConfig:
    """One RAMBlock: `-object memory-backend-*`, or the machine's own default."""

    name: str
    length_bytes: int
    memfd: bool = False
    share: bool = False


@dataclass(frozen=True)
class DeviceConfig:
    """One `-device`; the properties are checked by the device table."""

    driver: str
    properties: dict[str, int | str | bool] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True)
class DriveConfig:
    """`-drive if=none`: a raw disk image that a `-device` may name."""

    id: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class ActionConfig:
    """`-action`, `-no-reboot`, `-no-shutdown`: what events of the guest's life lead to."""

    reboot: str = "reset"  # reset | shutdown
    shutdown: str = "poweroff"  # poweroff | pause
    panic: str = "shutdown"  # shutdown | pause | exit-failure | none


@dataclass(frozen=True)
class MachineConfig:
    """The machine itself."""

    machine_type: str = "microvm"
    ram: tuple[BackendConfig, ...] = (BackendConfig("microvm.ram", 128 * MIB),)
    dirty_log: DirtyLogRung = "auto"
    cpu: str = "qemu64"
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    boot_drive: str | None = None
    devices: tuple[DeviceConfig, ...] = ()
    drives: tuple[DriveConfig, ...] = ()
    acpi: bool = True
    auto_command_line: bool = True  # without ACPI: tell Linux of the virtio transports
    name: str | None = None
    uuid: UUID | None = None
    actions: ActionConfig = ActionConfig()
    start_paused: bool = False
    incoming: str | None = None  # None, "defer" or a URI


@dataclass(frozen=True)
class ChardevConfig:
    """A character backend. `option` is what the user wrote, for messages."""

    id: str
    backend: str  # null | stdio | file | socket
    option: str
    path: str | None = None
    append: bool = False
    host: str | None = None
    port: int | None = None
    fd: int | None = None
    server: bool = False
    wait: bool = True
    nodelay: bool = False
    signal: bool = True
    reconnect_s: int = 0
    mux: bool = False  # several users, switched between with Ctrl-A
    exclusive: bool = True  # a listening QMP socket serves one client at a time


@dataclass(frozen=True)
class MonitorConfig:
    """A monitor on a character backend: QMP, or the human monitor (`readline`)."""

    chardev: str
    pretty: bool = False
    option: str = "-mon"
    readline: bool = False


@dataclass(frozen=True)
class HttpConfig:
    """`-http`: on a unix socket (`path`) or on TCP. `option` is what the user wrote, for messages."""

    option: str
    host: str = ""
    port: int = 0
    path: str | None = None
    token_path: str | None = None  # None: a new token is made
    allowed_hosts: frozenset[str] = frozenset()  # more names in the Host header, in lower case


@dataclass(frozen=True)
class LogConfig:
    """`-d`, `-D` and `-msg`."""

    items: tuple[str, ...] = ()
    file: str | None = None
    timestamp: bool = False
    guest_name: bool = False


@dataclass(frozen=True)
class Settings:
    """Everything the command line says."""

    machine: MachineConfig = MachineConfig()
    chardevs: tuple[ChardevConfig, ...] = ()
    serial: str | None = None  # id of its chardev; None: output is dropped
    console: str | None = None  # the same of virtconsole
    monitors: tuple[MonitorConfig, ...] = ()
    http: HttpConfig | None = None
    log: LogConfig = LogConfig()
    compat: dict[str, str] = field(default_factory=dict)
    migration_globals: tuple[tuple[str, str], ...] = ()  # -global migration.NAME=VALUE, in order
    pidfile: str | None = None
    daemonize: bool = False
    debug_threads: bool = False
    warnings: tuple[str, ...] = ()  # to be shown to the user; nothing is wrong
