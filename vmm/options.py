"""The command line -> Settings. QEMU's options in QEMU's syntax, by the table of `vmm.option_table`.

Two steps: each option's text is parsed on its own and noted; `_Builder.finish` then puts together what
belongs together, since in QEMU the order of options does not matter. Nothing here opens, starts or creates
anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vmm import option_help
from vmm.config import (
    ActionConfig,
    MachineConfig,
    MonitorConfig,
    Settings,
)
from vmm.errors import OptionError
from vmm.messages import Heading
from vmm.option_backends import Backends
from vmm.option_devices import Devices
from vmm.option_help import HelpRequested
from vmm.option_http import parse_http
from vmm.option_memory import Memory
from vmm.option_syntax import Key, accepted, parse_choice, parse_keys
from vmm.option_table import LOG_ITEMS, MACHINES, OPTIONS, Option, find_option

__all__ = ["HelpRequested", "parse_command_line"]

APPEND_LIMIT_BYTES = 4095
MICROVM_ONLY = ("acpi", "pit", "pic", "rtc", "isa-serial", "ioapic2", "x-option-roms", "auto-kernel-cmdline")
BOOL = Key("bool")
INCOMING_SCHEMES = ("tcp:", "unix:", "fd:", "exec:", "file:")


def parse_command_line(arguments: Sequence[str], heading: Heading | None = None) -> Settings:
    """Settings that fit together. `heading` is filled in option by option, for the error of a later one.

    Raises OptionError for whatever is wrong, HelpRequested when a help text is the answer.
    """
    builder = _Builder()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            raise OptionError(f"Unexpected argument '{argument}': expected an option; a disk is -drive file=")
        option = find_option(argument)
        if option is None:
            raise OptionError(f"Invalid option; {accepted_option(argument)}", argument)
        text = ""
        if option.form:
            if not rest:
                raise OptionError(f"Requires an argument: {option.form}", argument)
            text = rest.pop(0)
        shown = f"{argument} {text}" if option.form else argument
        try:
            builder.take(option, text, shown)
        except OptionError as error:
            if error.option is not None:
                raise
            raise OptionError(str(error), shown) from error
        if heading is not None:
            builder.fill(heading)
    return builder.finish()


def accepted_option(argument: str) -> str:
    """What was meant, or where the list is."""
    import difflib

    near = difflib.get_close_matches(argument.lstrip("-"), OPTIONS, 1)
    return (f"did you mean -{near[0]}? " if near else "") + "-help lists what is accepted"


class _Builder:
    """Notes options one by one."""

    def __init__(self) -> None:
        self._machine = MachineConfig()
        self._settings = Settings()
        self._machine_keys: dict[str, Any] = {}
        self._memory = Memory()
        self._devices = Devices()
        self._backends = Backends()
        self._warnings: list[str] = []
        self._handlers: dict[str, Callable[[str, str], None]] = {
            name.removeprefix("_on_").replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name.startswith("_on_")
        }

    def take(self, option: Option, text: str, shown: str) -> None:
        """One option with its value. Raises OptionError without the option's name."""
        if option.harmless:
            return
        handler = self._handlers.get(option.name)
        if handler is not None:
            handler(text, shown)
        else:
            parse_keys(text, option.implied, option.keys)  # a fixed choice: only the right one is accepted

    def fill(self, heading: Heading) -> None:
        """What -msg and -name have said so far."""
        log = self._settings.log
        heading.timestamp = log.timestamp
        heading.guest_name = self._machine.name if log.guest_name else None

    def _set_machine(self, **changes: Any) -> None:
        self._machine = replace(self._machine, **changes)

    def _set(self, **changes: Any) -> None:
        self._settings = replace(self._settings, **changes)

    # ---- help and version ----

    def _on_help(self, text: str, shown: str) -> None:
        raise HelpRequested(option_help.usage())

    def _on_version(self, text: str, shown: str) -> None:
        raise HelpRequested(option_help.version())

    # ---- machine ----

    def _on_machine(self, text: str, shown: str) -> None:
        option = OPTIONS["machine"]
        if text in ("help", "?"):
            raise HelpRequested(option_help.machines())
        if "help" in text.split(","):
            raise HelpRequested(option_help.keys("machine", option.keys))
        values = parse_keys(text, option.implied, option.keys)
        if "type" in values and values["type"] not in MACHINES:
            raise OptionError(f"Unsupported machine type '{values['type']}'; {accepted(MACHINES)}")
        self._machine_keys.update(values)
        if "accel" in values:
            _check_accelerator(str(values["accel"]))

    def _on_accel(self, text: str, shown: str) -> None:
        if text in ("help", "?"):
            raise HelpRequested("Accelerators supported in this binary:\ntcg\n")
        option = OPTIONS["accel"]
        values = parse_keys(text, option.implied, option.keys)
        _check_accelerator(str(values.get("accel", "tcg")))

    def _on_cpu(self, text: str, shown: str) -> None:
        if text in ("help", "?"):
            raise HelpRequested(option_help.cpus())
        from vmm.cpu.cpuid import CpuModel  # only this option needs it

        CpuModel.parse(text)
        self._set_machine(cpu=text)

    def _on_smp(self, text: str, shown: str) -> None:
        option = OPTIONS["smp"]
        for key, value in parse_keys(text, option.implied, option.keys).items():
            if value != 1:
                raise OptionError(f"Parameter '{key}' must be 1: the machine has one vCPU, got {value}")

    def _on_m(self, text: str, shown: str) -> None:
        self._memory.set_size(text)

    def _on_name(self, text: str, shown: str) -> None:
        option = OPTIONS["name"]
        values = parse_keys(text, option.implied, option.keys)
        if "guest" in values:
            self._set_machine(name=values["guest"])
        self._set(debug_threads=values.get("debug-threads", self._settings.debug_threads))

    def _on_uuid(self, text: str, shown: str) -> None:
        import uuid

        try:
            self._set_machine(uuid=uuid.UUID(text))
        except ValueError:
            expected = "expected xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
            raise OptionError(f"Failed to parse UUID string, {expected}") from None

    def _on_object(self, text: str, shown: str) -> None:
        if text in ("help", "?"):
            raise HelpRequested(option_help.objects())
        self._memory.add_object(text)

    def _on_numa(self, text: str, shown: str) -> None:
        self._memory.add_numa_node(text)

    def _on_device(self, text: str, shown: str) -> None:
        self._devices.add(text, shown, self._backends)

    def _on_global(self, text: str, shown: str) -> None:
        name, equals, value = text.partition("=")
        driver, dot, prop = name.partition(".")
        if not dot:
            values = parse_keys(text, None, OPTIONS["global"].keys)
            driver, prop, value = (str(values.get(key, "")) for key in ("driver", "property", "value"))
            equals = "=" if "value" in values else ""
        if not (driver and prop and equals):
            raise OptionError("Expected driver.property=value")
        if (driver, prop) == ("virtio-mmio", "force-legacy"):
            if parse_keys(f"force-legacy={value}", None, {"force-legacy": BOOL})["force-legacy"]:
                raise OptionError("There is no legacy transport: only false is possible")
        elif driver == "migration":
            known = (*self._settings.migration_globals, (prop, value))
            self._set(migration_globals=known)
        else:
            self._warnings.append(f"{shown}: ignored, there is no {driver} here")

    # ---- boot ----

    def _on_kernel(self, text: str, shown: str) -> None:
        self._set_machine(kernel=text)

    def _on_initrd(self, text: str, shown: str) -> None:
        self._set_machine(initrd=text)

    def _on_append(self, text: str, shown: str) -> None:
        length = len(text.encode("utf-8", "surrogateescape"))
        if length > APPEND_LIMIT_BYTES or "\0" in text:
            raise OptionError(f"Expected at most {APPEND_LIMIT_BYTES} bytes, got {length}", "-append")
        self._set_machine(append=text)

    def _on_drive(self, text: str, shown: str) -> None:
        self._devices.add_drive(text)

    def _on_no_acpi(self, text: str, shown: str) -> None:
        self._machine_keys["acpi"] = "off"

    # ---- running ----

    def _on_S(self, text: str, shown: str) -> None:  # noqa: N802 - the option's own name
        self._set_machine(start_paused=True)

    def _on_no_shutdown(self, text: str, shown: str) -> None:
        self._set_machine(actions=replace(self._machine.actions, shutdown="pause"))

    def _on_no_reboot(self, text: str, shown: str) -> None:
        self._set_machine(actions=replace(self._machine.actions, reboot="shutdown"))

    def _on_action(self, text: str, shown: str) -> None:
        values = parse_keys(text, None, OPTIONS["action"].keys)
        values.pop("watchdog", None)  # there is none that could fire
        old = self._machine.actions
        actions = {
            name: str(values.get(name, getattr(old, name))) for name in ("reboot", "shutdown", "panic")
        }
        self._set_machine(actions=ActionConfig(**actions))

    def _on_incoming(self, text: str, shown: str) -> None:
        if text != "defer" and not text.startswith(INCOMING_SCHEMES):
            expected = accepted(["defer", *INCOMING_SCHEMES])
            raise OptionError(f"unknown migration protocol: {text}; {expected}")
        self._set_machine(incoming=text)

    def _on_pidfile(self, text: str, shown: str) -> None:
        self._set(pidfile=text)

    def _on_daemonize(self, text: str, shown: str) -> None:
        self._set(daemonize=True)

    # ---- character backends ----

    def _on_serial(self, text: str, shown: str) -> None:
        self._backends.use_for_serial(text, shown)

    def _on_nographic(self, text: str, shown: str) -> None:
        self._backends.nographic = True

    def _on_nodefaults(self, text: str, shown: str) -> None:
        self._backends.no_defaults = True

    def _on_qmp(self, text: str, shown: str) -> None:
        self._backends.add_monitor(text, shown)

    def _on_qmp_pretty(self, text: str, shown: str) -> None:
        self._backends.add_monitor(text, shown, pretty=True)

    def _on_chardev(self, text: str, shown: str) -> None:
        if text in ("help", "?"):
            raise HelpRequested(option_help.chardevs())
        self._backends.add_chardev(text, shown)

    def _on_mon(self, text: str, shown: str) -> None:
        option = OPTIONS["mon"]
        values = parse_keys(text, option.implied, option.keys)
        if "chardev" not in values:
            raise OptionError("Parameter 'chardev' is missing")
        readline = values.get("mode", "readline") == "readline"
        if readline and "pretty" in values:
            raise OptionError("'pretty' is not compatible with HMP monitors")
        monitor = MonitorConfig(str(values["chardev"]), bool(values.get("pretty", False)), shown, readline)
        self._backends.monitors.append(monitor)

    def _on_monitor(self, text: str, shown: str) -> None:
        self._backends.add_monitor(text, shown, readline=True)

    def _on_http(self, text: str, shown: str) -> None:
        if self._settings.http is not None:
            raise OptionError("Only one is possible")
        self._set(http=parse_http(text, shown))

    # ---- logs ----

    def _on_d(self, text: str, shown: str) -> None:
        if text in ("help", "?"):
            raise HelpRequested(option_help.log_items())
        items = list(LOG_ITEMS) if text == "all" else text.split(",")
        for item in items:
            parse_choice("item", item, LOG_ITEMS)
        self._log(items=(*self._settings.log.items, *items))

    def _on_D(self, text: str, shown: str) -> None:  # noqa: N802 - the option's own name
        self._log(file=text)

    def _on_trace(self, text: str, shown: str) -> None:
        if text in ("help", "?"):
            raise HelpRequested(option_help.log_items())
        self._log(items=(*self._settings.log.items, "migration"))

    def _on_msg(self, text: str, shown: str) -> None:
        values = parse_keys(text, None, OPTIONS["msg"].keys)
        old = self._settings.log
        guest_name = values.get("guest-name", old.guest_name)
        self._log(timestamp=values.get("timestamp", old.timestamp), guest_name=guest_name)

    def _log(self, **changes: Any) -> None:
        self._set(log=replace(self._settings.log, **changes))

    def _on_compat(self, text: str, shown: str) -> None:
        values = parse_keys(text, None, OPTIONS["compat"].keys)
        self._set(compat={**self._settings.compat, **{key: str(value) for key, value in values.items()}})

    # ---- all together ----

    def finish(self) -> Settings:
        """Raises OptionError where options contradict each other."""
        keys = self._machine_keys
        machine_type = str(keys.get("type", "microvm"))
        for key in MICROVM_ONLY:
            if key in keys and machine_type != "microvm":
                raise OptionError(f"Property '{machine_type}-machine.{key}' not found", "-machine")
        machine = replace(
            self._machine,
            machine_type=machine_type,
            ram=self._memory.finish(machine_type, keys.get("memory-backend")),
            dirty_log=keys.get("x-dirty-log", "auto"),
            acpi=machine_type == "microvm" and keys.get("acpi") != "off",
            auto_command_line=keys.get("auto-kernel-cmdline") != "off",
        )
        machine = self._devices.finish(machine)
        if machine.initrd is not None and machine.kernel is None:
            raise OptionError("Only allowed with -kernel", "-initrd")
        if machine.kernel is not None and machine.boot_drive is not None:
            raise OptionError("Only one of -kernel and -drive can be booted", "-drive")
        boots = (machine.kernel, machine.boot_drive, machine.incoming) != (None, None, None)
        if machine.append and not boots:
            raise OptionError("Only allowed with -kernel or -drive", "-append")
        settings = replace(self._settings, machine=machine, warnings=tuple(self._warnings))
        settings = self._backends.finish(settings)
        if settings.daemonize:
            for chardev in settings.chardevs:
                if chardev.backend == "stdio":
                    raise OptionError(f"Cannot be used with -daemonize, '{chardev.option}' is", "stdio")
        return settings


def _check_accelerator(text: str) -> None:
    if "tcg" not in text.split(":"):
        raise OptionError(f"Accelerator '{text}' is not available; {accepted(['tcg'])}")
