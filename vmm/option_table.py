"""The command line options, one row each: what is accepted and what -help says come from the same table.

A row without `form` is a switch. `keys` are the keys of a `k=v,...` value and `implied` is the key of its
first item. `harmless` rows are ignored: management tools pass them to QEMU, and what they ask for is already
so here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.option_syntax import Key

__all__ = ["GROUPS", "LOG_ITEMS", "MACHINES", "OBJECTS", "OPTIONS", "Option", "find_option"]

MACHINES = {
    "microvm": "microvm (i386): RAM around a hole below 4 GiB, 16550 UART",
    "none": "empty machine: RAM in one piece; a UART all the same",
}

OBJECTS = {
    "memory-backend-ram": "guest RAM in anonymous memory (share=on: in a memfd)",
    "memory-backend-memfd": "guest RAM in a memfd",
}

LOG_ITEMS = {
    "machine": "run states, resets, shutdowns",
    "migration": "states, threads and messages of migrations",
    "qmp": "monitors, commands, events",
    "cpu": "the CPU engine",
    "unimp": "what the guest asked for and we do not have",
    "guest_errors": "what the guest did wrong",
}

_SOCKET = {
    "server": Key("bool", "listen (on) or connect out (off)"),
    "wait": Key("bool", "wait for a client before the machine starts"),
    "nodelay": Key("bool", "disable Nagle's algorithm"),
    "reconnect": Key("number", "seconds between attempts to connect, 0 = once"),
    "x-exclusive": Key("bool", "off: a QMP monitor serves all its clients at once"),
}
BACKEND_KEYS = {
    "address": Key("text"),
    **_SOCKET,
    "pretty": Key("bool", "multi-line JSON"),
    "append": Key("bool", "file: add to its end"),
    "signal": Key("bool", "stdio: Ctrl-C ends the process"),
}
CHARDEV_KEYS = {
    "backend": Key("null|file|stdio|socket"),
    "id": Key("text", "its name for -serial and -mon"),
    "path": Key("text", "file, or unix socket"),
    "append": BACKEND_KEYS["append"],
    "signal": BACKEND_KEYS["signal"],
    "host": Key("text", "TCP host"),
    "port": Key("text", "TCP port"),
    "fd": Key("number", "inherited socket"),
    **_SOCKET,
    "mux": Key("bool", "serial port and human monitors may share it, Ctrl-A C switches"),
    "ipv4": Key("bool"),
    "ipv6": Key("bool"),
}
_POLICY = Key("accept|hide")


@dataclass(frozen=True)
class Option:
    """One option; `name` without its dash."""

    name: str
    form: str
    help: str
    keys: dict[str, Key] = field(default_factory=dict)
    implied: str | None = None
    aliases: tuple[str, ...] = ()
    harmless: bool = False


_STANDARD = (
    Option("help", "", "show this text", aliases=("h", "-help")),
    Option("version", "", "show the version", aliases=("-version",)),
    Option(
        "machine",
        "[type=]name[,prop=value...]",
        "the machine: microvm or none ('-machine help' for a list)",
        {
            "type": Key("text", "machine type"),
            "accel": Key("text", "must allow tcg"),
            "memory-backend": Key("text", "id of the -object that is the guest's RAM"),
            "x-dirty-log": Key(
                "auto|engine|async|sync", "how guest writes are found; auto: the best there is"
            ),
            "acpi": Key("on|off|auto"),
            "pit": Key("on|off|auto"),
            "pic": Key("on|off|auto"),
            "rtc": Key("on|off|auto"),
            "isa-serial": Key("on|off|auto"),
            "ioapic2": Key("on|off|auto", "there is none"),
            "x-option-roms": Key("on|off|auto"),
            "auto-kernel-cmdline": Key("on|off|auto"),
            "graphics": Key("on|off|auto"),
            "usb": Key("on|off|auto"),
            "dump-guest-core": Key("bool"),
            "mem-merge": Key("bool"),
        },
        "type",
        aliases=("M",),
    ),
    Option("cpu", "model", "the CPU model ('-cpu help' for a list); default qemu64"),
    Option(
        "accel",
        "[accel=]name",
        "tcg is the only one",
        {
            "accel": Key("text"),
            "thread": Key("single|multi"),
            "tb-size": Key("number"),
            "one-insn-per-tb": Key("bool"),
            "split-wx": Key("bool"),
        },
        "accel",
    ),
    Option(
        "smp",
        "[cpus=]n",
        "one vCPU is what there is",
        {
            name: Key("number")
            for name in ("cpus", "maxcpus", "sockets", "dies", "clusters", "cores", "threads")
        },
        "cpus",
    ),
    Option(
        "m",
        "[size=]megs",
        "guest RAM, 1M to 64G; suffix M (default), G or K; 128M if not given",
        {"size": Key("text", "RAM size"), "slots": Key("number"), "maxmem": Key("text")},
        "size",
    ),
    Option(
        "name",
        "[guest=]text",
        "the guest's name",
        {
            "guest": Key("text", "what query-name shows"),
            "process": Key("text", "ignored"),
            "debug-threads": Key("bool", "name the threads for the kernel, too"),
        },
        "guest",
    ),
    Option("uuid", "uuid", "the guest's UUID"),
    Option(
        "object",
        "type,id=ID,size=SIZE[,...]",
        "a RAMBlock; guest RAM once -machine memory-backend= or -numa names it",
        {
            "qom-type": Key("text"),
            "id": Key("text", "its name, and that of the RAMBlock in the migration stream"),
            "size": Key("size", "bytes, or with a suffix"),
            "share": Key("bool", "a shared (on) or private (off) mapping; memfd: on by default, ram: off"),
            "merge": Key("bool"),
            "dump": Key("bool"),
            "prealloc": Key("bool", "must be off"),
            "hugetlb": Key("bool", "must be off"),
            "seal": Key("bool", "ignored: nobody else has the memfd"),
        },
        "qom-type",
    ),
    Option(
        "numa",
        "node,memdev=ID",
        "use the -object ID as the next piece of guest RAM; several give several RAMBlocks",
        {"type": Key("node"), "memdev": Key("text"), "nodeid": Key("number"), "cpus": Key("text")},
        "type",
    ),
    Option("device", "driver[,prop=value...]", "a device ('-device help' for a list)"),
    Option(
        "global",
        "driver.prop=value",
        "a default property; `migration.NAME` sets a capability or parameter",
        {"driver": Key("text"), "property": Key("text"), "value": Key("text")},
    ),
)

_BOOT = (
    Option(
        "kernel",
        "FILE",
        "a Linux bzImage, an ELF file with a PVH note, or any ELF file to enter in protected or long mode",
    ),
    Option("initrd", "FILE", "the initial RAM disk of a Linux kernel"),
    Option("append", "TEXT", "the kernel's command line, NUL-terminated at guest address 0x20000"),
    Option(
        "drive",
        "file=FILE,format=raw",
        "boot the first sector of FILE in real mode at 0x7c00; if=none,id=ID: an image for virtio-blk-device",
        {
            "file": Key("text"),
            "format": Key("text", "raw"),
            "if": Key("text", "ide (default) to boot, none for a -device"),
            "id": Key("text", "what -device calls it"),
            "index": Key("number"),
            "media": Key("disk"),
            "cache": Key("text"),
            "readonly": Key("bool", "the guest may not write"),
            "snapshot": Key("bool"),
        },
    ),
)

_RUN = (
    Option("S", "", "do not start the guest; `cont` does"),
    Option("no-shutdown", "", "stop instead of quitting when the guest shuts down"),
    Option("no-reboot", "", "shut down instead of rebooting"),
    Option(
        "action",
        "event=action[,...]",
        "what follows a reboot, a shutdown, a panic",
        {
            "reboot": Key("reset|shutdown"),
            "shutdown": Key("poweroff|pause"),
            "panic": Key("pause|shutdown|exit-failure|none"),
            "watchdog": Key("reset|shutdown|poweroff|pause|debug|none|inject-nmi"),
        },
    ),
    Option(
        "incoming",
        "defer|tcp:[HOST]:PORT|unix:PATH|fd:FD|exec:COMMAND|file:PATH",
        "wait for a migration, or (defer) for migrate-incoming",
    ),
    Option("pidfile", "FILE", "write the process id to FILE, remove it at the end"),
    Option("daemonize", "", "go to the background once the sockets listen"),
)

_CHARACTER = (
    Option(
        "serial",
        "[mon:]stdio|file:PATH|unix:PATH[,server=on][,wait=off]|tcp:HOST:PORT[,...]|null|chardev:ID",
        "where COM1 leads to; mon: shares it with the human monitor",
        BACKEND_KEYS,
        "address",
    ),
    Option(
        "qmp",
        "unix:PATH[,server=on][,wait=off]|tcp:HOST:PORT[,...]|stdio|chardev:ID",
        "a QMP monitor; without server=on it connects out; several are allowed",
        BACKEND_KEYS,
        "address",
    ),
    Option("qmp-pretty", "as -qmp", "as -qmp, with multi-line JSON", BACKEND_KEYS, "address"),
    Option(
        "chardev", "backend,id=ID[,...]", "a character backend ('-chardev help')", CHARDEV_KEYS, "backend"
    ),
    Option(
        "mon",
        "[chardev=]ID[,mode=readline|control]",
        "a human (readline) or QMP (control) monitor on a character backend",
        {
            "chardev": Key("text"),
            "mode": Key("control|readline"),
            "pretty": Key("bool", "multi-line JSON"),
        },
        "chardev",
    ),
    Option("monitor", "stdio|unix:PATH[,...]|...|none", "a human monitor", BACKEND_KEYS, "address"),
)

_HTTP = Option(
    "http",
    "HOST:PORT|unix:PATH[,token=FILE][,hosts=NAME/...][,public=on]",
    "a status page, metrics, the QMP reference, and QMP over WebSocket at /qmp",
    {
        "address": Key("text"),
        "token": Key("text", "file, mode 0600, with the bearer token of /qmp; by default a new one is made"),
        "hosts": Key("text", "more names to be called by, such as a proxy's, separated by '/'"),
        "public": Key("bool", "allow an address that others can reach"),
    },
    "address",
)

_DEBUG = (
    Option("d", "item[,...]", "what to log ('-d help' for a list)"),
    Option("D", "FILE", "log to FILE instead of stderr"),
    Option("trace", "pattern", "log the migration's events", aliases=("T",)),
    Option(
        "msg",
        "[timestamp=on|off][,guest-name=on|off]",
        "what messages begin with",
        {"timestamp": Key("bool"), "guest-name": Key("bool")},
    ),
    Option(
        "compat",
        "unstable-output=accept|hide[,...]",
        "what of the unstable and deprecated QMP interface clients see",
        {
            "unstable-output": _POLICY,
            "deprecated-output": _POLICY,
            "unstable-input": Key("accept|reject|crash"),
            "deprecated-input": Key("accept|reject|crash"),
        },
    ),
)

_HARMLESS = (
    Option("display", "none", "there is no display", {"type": Key("none"), "gl": Key("off")}, "type"),
    Option("nographic", "", "serial port and human monitor share stdio unless given otherwise"),
    Option("vga", "none", "there is no graphics card", {"type": Key("none")}, "type"),
    Option("nodefaults", "", "no serial port and human monitor for -nographic"),
    Option("no-user-config", "", "there is none", harmless=True),
    Option("nodefconfig", "", "as above", harmless=True),
    Option("no-acpi", "", "as -machine acpi=off"),
    Option("no-hpet", "", "there is no HPET", harmless=True),
    Option("only-migratable", "", "everything here is", harmless=True),
    Option("sandbox", "on|off[,...]", "ignored", harmless=True),
    Option("rtc", "base=...", "ignored: no clock chip", harmless=True),
    Option("boot", "...", "ignored", harmless=True),
    Option("overcommit", "mem-lock=off|cpu-pm=off", "ignored", harmless=True),
    Option("net", "none", "there is no network", {"type": Key("none")}, "type"),
    Option("nic", "none", "there is no network", {"type": Key("none")}, "type"),
    Option("parallel", "none", "there is no parallel port", {"type": Key("none|null")}, "type"),
    Option("audiodev", "...", "ignored", harmless=True),
    Option("k", "language", "ignored", harmless=True),
    Option("L", "path", "ignored: there is no firmware", harmless=True),
)

GROUPS: dict[str, tuple[Option, ...]] = {
    "Machine": _STANDARD,
    "Boot": _BOOT,
    "Running": _RUN,
    "Character backends and monitors": (*_CHARACTER, _HTTP),
    "Logs and compatibility": _DEBUG,
    "Accepted for QEMU's sake": _HARMLESS,
}

OPTIONS: dict[str, Option] = {
    name: option for group in GROUPS.values() for option in group for name in (option.name, *option.aliases)
}


def find_option(argument: str) -> Option | None:
    """The option that `-name` or `--name` stands for."""
    name = argument.removeprefix("-")
    return OPTIONS.get(name) or OPTIONS.get(name.removeprefix("-"))
