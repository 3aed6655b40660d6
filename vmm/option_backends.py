"""-serial, -monitor, -qmp, -chardev and -mon: which character backends there are and who uses which.

    -serial unix:P,server=on     is   -chardev socket,id=serial0,path=P,server=on  with COM1 on it
    -qmp tcp:H:P                 is   -chardev socket,id=compat_monitor0,host=H,port=P
                                      -mon compat_monitor0,mode=control
    -serial mon:stdio            is   -chardev stdio,id=serial0,mux=on,signal=off  with COM1 on it, and
                                      -mon serial0,mode=readline
    -nographic                   is   -serial mon:stdio, unless a serial port or a monitor is asked for

Rules: a backend has one user, one with mux=on a serial port and any number of human monitors; stdio exists
once. Source: QEMU `chardev/char.c` (qemu_chr_parse_compat), `softmmu/vl.c`.
"""

from __future__ import annotations

from dataclasses import replace

from vmm.config import ChardevConfig, MonitorConfig, Settings
from vmm.errors import OptionError
from vmm.option_syntax import accepted, parse_keys
from vmm.option_table import BACKEND_KEYS, CHARDEV_KEYS, OPTIONS

__all__ = ["Backends"]

FORMS = ("stdio", "null", "file:PATH", "unix:PATH", "tcp:HOST:PORT", "chardev:ID")
UNIX_PATH_BYTES = 107
"""What fits into sockaddr_un.sun_path with its NUL."""
_ONLY_FOR = {
    "path": ("file", "socket"),
    "append": ("file",),
    "signal": ("stdio",),
    "mux": ("null", "file", "stdio", "socket"),
}


class Backends:
    """Collects; `finish` checks what belongs together."""

    def __init__(self) -> None:
        self.nographic = False
        self.no_defaults = False
        self.no_monitor = False
        self.monitors: list[MonitorConfig] = []
        self._chardevs: dict[str, ChardevConfig] = {}
        self._serial: str | None = None
        self._serial_option: str | None = None
        self._console: str | None = None
        self._console_option = ""

    def use_for_serial(self, text: str, shown: str) -> None:
        """-serial TEXT."""
        if self._serial_option is not None:
            raise OptionError(f"The machine has one serial port, '{self._serial_option}' names its backend")
        self._serial_option = shown
        if text == "none":
            return
        self._serial = self._compat(text, "serial0", shown)[0]

    def use_for_console(self, name: str, shown: str) -> None:
        """-device virtconsole,chardev=NAME."""
        if self._console is not None:
            raise OptionError(f"The machine has one virtio console, '{self._console_option}' is it")
        self._console, self._console_option = name, shown

    def add_monitor(self, text: str, shown: str, *, pretty: bool = False, readline: bool = False) -> None:
        """-qmp TEXT, -qmp-pretty TEXT, or -monitor TEXT (`readline`)."""
        if text in ("none", "null"):
            self.no_monitor = True
            return
        if text.startswith("mon:"):
            raise OptionError("A monitor cannot be shared with itself: leave 'mon:' away")
        name, values = self._compat(text, f"compat_monitor{len(self.monitors)}", shown)
        pretty = bool(values.get("pretty", pretty))
        if readline and "pretty" in values:
            raise OptionError("'pretty' is not compatible with HMP monitors")
        self.monitors.append(MonitorConfig(name, pretty, shown, readline))

    def add_chardev(self, text: str, shown: str) -> None:
        """-chardev TEXT."""
        values = parse_keys(text, OPTIONS["chardev"].implied, CHARDEV_KEYS)
        for key in ("backend", "id"):
            if key not in values:
                raise OptionError(f"Parameter '{key}' is missing")
        backend = str(values["backend"])
        for key in values:
            if backend not in _ONLY_FOR.get(key, (backend if key in ("backend", "id") else "socket",)):
                raise OptionError(f"Invalid parameter '{key}' for a {backend} backend")
        if backend == "file" and "path" not in values:
            raise OptionError("Parameter 'path' is missing")
        config = self._common(str(values["id"]), backend, shown, values)
        if backend == "socket":
            config = _socket(config, values)
        self._add(replace(config, path=None if "path" not in values else str(values["path"])))

    def finish(self, settings: Settings) -> Settings:
        """`settings` with its backends. Raises OptionError: an unknown id, or one used twice."""
        if self.nographic and not self.no_defaults and not self._has_stdio():
            self._use_stdio()
        users: dict[str, str] = {}
        wanted = [(monitor.chardev, monitor.option) for monitor in self.monitors]
        if self._serial is not None:
            wanted.append((self._serial, self._serial_option or "-nographic"))
        if self._console is not None:
            wanted.append((self._console, self._console_option))
        for name, option in wanted:
            if name not in self._chardevs:
                raise OptionError(f'Chardev "{name}" not found; {accepted(self._chardevs, name)}', option)
            if name in users and not self._chardevs[name].mux:
                raise OptionError(f"Chardev '{name}' is in use by '{users[name]}'", option)
            users[name] = option
        for monitor in self.monitors:
            _check_monitor(monitor, self._chardevs[monitor.chardev])
        for chardev in self._chardevs.values():
            by_qmp = any(each.chardev == chardev.id and not each.readline for each in self.monitors)
            if not chardev.exclusive and not (by_qmp and chardev.server):
                raise OptionError("'x-exclusive' is for QMP monitors that listen", chardev.option)
        chardevs = tuple(self._chardevs.values())
        return replace(
            settings,
            chardevs=chardevs,
            monitors=tuple(self.monitors),
            serial=self._serial,
            console=self._console,
        )

    # ---- helpers ----

    def _use_stdio(self) -> None:
        """-nographic, for what nothing else was said about."""
        wants_serial = self._serial_option is None
        wants_monitor = not self.monitors and not self.no_monitor
        if not (wants_serial or wants_monitor):
            return
        shared = wants_serial and wants_monitor
        name = "serial0" if wants_serial else "compat_monitor0"
        self._add(ChardevConfig(name, "stdio", "-nographic", mux=shared, signal=not shared))
        if wants_serial:
            self._serial = name
        if wants_monitor:
            self.monitors.append(MonitorConfig(name, option="-nographic", readline=True))

    def _compat(self, text: str, name: str, shown: str) -> tuple[str, dict[str, int | str | bool]]:
        """A backend in the short form; gives its id and its values."""
        values = parse_keys(text, "address", BACKEND_KEYS)
        address = str(values.get("address", ""))
        if address.startswith("mon:"):
            # Ctrl-C belongs to the guest then: Ctrl-A X is the way out.
            values = {"signal": address != "mon:stdio", **values, "mux": True}
            address = address.removeprefix("mon:")
            self.monitors.append(MonitorConfig(name, option=shown, readline=True))
        kind, colon, rest = address.partition(":")
        if kind == "chardev" and colon:
            if "mux" in values:
                raise OptionError("'mon:' makes a backend of its own; -chardev has mux=on")
            return rest, values
        if address in ("stdio", "null"):
            self._add(self._common(name, address, shown, values))
        elif kind == "file" and rest:
            self._add(replace(self._common(name, "file", shown, values), path=rest))
        elif kind in ("unix", "tcp") and rest:
            more: dict[str, int | str | bool] = {"path": rest}
            if kind == "tcp":
                host, colon, port = rest.rpartition(":")
                if not colon:
                    raise OptionError(f"Error parsing address '{rest}': expected HOST:PORT")
                more = {"host": host, "port": port}
            config = _socket(self._common(name, "socket", shown, values), {**values, **more})
            self._add(replace(config, path=rest if kind == "unix" else None))
        else:
            raise OptionError(f"'{address}' is not a valid char driver; {accepted(FORMS, address)}")
        return name, values

    @staticmethod
    def _common(name: str, backend: str, shown: str, values: dict[str, int | str | bool]) -> ChardevConfig:
        return ChardevConfig(
            name,
            backend,
            shown,
            append=bool(values.get("append")),
            signal=bool(values.get("signal", True)),
            mux=bool(values.get("mux")),
        )

    def _has_stdio(self) -> bool:
        return any(chardev.backend == "stdio" for chardev in self._chardevs.values())

    def _add(self, chardev: ChardevConfig) -> None:
        if chardev.id in self._chardevs:
            raise OptionError(f"Chardev with id '{chardev.id}' already exists")
        if chardev.backend == "stdio" and self._has_stdio():
            raise OptionError("Cannot use stdio by multiple character devices")
        self._chardevs[chardev.id] = chardev


def _check_monitor(monitor: MonitorConfig, chardev: ChardevConfig) -> None:
    if monitor.readline:
        return
    if chardev.backend not in ("socket", "stdio"):
        raise OptionError(f"A QMP monitor needs a socket or stdio, not {chardev.backend}", monitor.option)
    if chardev.mux:
        raise OptionError("A QMP monitor cannot share its backend: mux must be off", monitor.option)


def _socket(config: ChardevConfig, values: dict[str, int | str | bool]) -> ChardevConfig:
    given = [key for key in ("path", "host", "fd") if key in values]
    if len(given) != 1 or ("host" in values) != ("port" in values):
        raise OptionError("A socket needs one of path=, host= with port=, or fd=")
    server = bool(values.get("server", False))
    if not server and values.get("wait"):  # wait=off without server is harmless, as in QEMU
        raise OptionError("'wait' option is incompatible with socket in client connect mode")
    reconnect = int(values.get("reconnect", 0))
    if server and reconnect:
        raise OptionError("'reconnect' option is incompatible with 'server'")
    path = values.get("path")
    if path is not None:
        length = len(str(path).encode("utf-8", "surrogateescape"))
        if length > UNIX_PATH_BYTES:
            raise OptionError(
                f"UNIX socket path '{path}' is too long: {length} bytes, at most {UNIX_PATH_BYTES}"
            )
    return replace(
        config,
        host=None if "host" not in values else str(values["host"]),
        port=None if "port" not in values else _port(str(values["port"])),
        fd=None if "fd" not in values else int(values["fd"]),
        server=server,
        wait=server and bool(values.get("wait", True)),
        nodelay=bool(values.get("nodelay", False)),
        reconnect_s=reconnect,
        exclusive=bool(values.get("x-exclusive", True)),
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise OptionError(f"Parameter 'port' expects a number from 0 to 65535, got '{text}'")
    return int(text)
