"""The human monitor: lines in, text out, in the spelling and output shape of QEMU 7.2's.

Each command is a row of a table: its names, its parameters in QEMU's notation, and a handler. Parameters:

    -d      a flag; any order among flags, before the rest
    s, S    a word, or "quoted text"; S takes the rest of the line
    s?      a word that may be missing
    b       on or off
    i       a number, decimal, octal or hexadecimal
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from qmp.errors import QmpError
from vmm.control import absent, human_info, memory
from vmm.control.interfaces import FdTaker, MachineControl, MigratorControl
from vmm.control.refusals import refusal_text
from vmm.control.run_state import STOP_WAIT_S
from vmm.errors import PageferryError
from vmm.migration.params import ALIASES, PARAMETERS, Capability
from vmm.migration.status import MigrationStatus

__all__ = ["HumanMonitor"]

Arguments = dict[str, Any]
WaitUntil = Callable[[Callable[[], bool]], None]
_UNDER_WAY: Final = ("setup", "active", "pre-switchover", "device", "cancelling")
_WORD = re.compile(r'[ \t]*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<word>[^\s"]\S*))')
_ESCAPES: Final = {"n": "\n", "r": "\r"}


@dataclass(frozen=True)
class HumanCommand:
    """A row of the table. `usage` is what help shows; `parameters`: (name, kind)."""

    names: str
    usage: str
    help: str
    parameters: tuple[tuple[str, str], ...]
    handler: Callable[[Arguments], str | None]

    def matches(self, name: str) -> bool:
        """Whether `name` is one of its names."""
        return name in self.names.split("|")

    def line(self, prefix: str = "") -> str:
        """Its line of help."""
        return f"{prefix}{self.names} {self.usage} -- {self.help}\n"


class _BadArguments(Exception):
    """The parameters do not fit; the text is printed."""


class HumanMonitor:
    """Executes command lines. Nothing here blocks: `migrate` goes on in the background, as with -d."""

    def __init__(
        self,
        machine: MachineControl,
        migrator: MigratorControl,
        info: human_info.InfoSources,
        powerdown: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._migrator = migrator
        self._fds: FdTaker | None = None
        self._wait_until: WaitUntil | None = None
        self._powerdown = powerdown
        self._infos = [
            HumanCommand(name, "", help_, (), functools.partial(_show, show, info))
            for name, help_, show in human_info.SUBCOMMANDS
        ]
        self._commands = sorted(self._make_commands(), key=lambda command: command.names)

    def execute(self, line: str, fds: FdTaker | None = None, *, wait_until: WaitUntil | None = None) -> str:
        """Execute a line; what it prints, lines ended by CR LF. Errors are printed, never raised.

        `fds` are the descriptors that `fd:NAME` refers to. `wait_until` is what a terminal gives that can
        wait: it takes a condition, and shows the next prompt when it holds.
        """
        self._fds = fds
        self._wait_until = wait_until
        return self._execute(line.strip(" \t\r\n")).replace("\n", "\r\n")

    def _execute(self, line: str) -> str:
        name, _, rest = line.partition(" ")
        if not name:
            return ""
        table, prefix = self._commands, ""
        if name == "info" and rest.strip():
            name, _, rest = rest.strip().partition(" ")
            table, prefix = self._infos, "info "
        command = next((each for each in table if each.matches(name)), None)
        if command is None:
            return f"unknown command: '{prefix}{name}'\n"
        try:
            return command.handler(_parse(command, rest)) or ""
        except _BadArguments as error:
            return f'{error}\nTry "help {prefix}{name}" for more information\n'
        except QmpError as error:
            return f"Error: {error}\n"
        except Exception as error:
            if (text := refusal_text(error)) is None:
                raise
            return f"Error: {text}\n"

    def complete(self, text: str) -> list[str]:
        """What the last word of `text` may become."""
        *words, last = text.split(" ")
        words = [word for word in words if word]
        match words:
            case []:
                found = self._names()
            case ["info"]:
                found = [each.names for each in self._infos]
            case ["help" | "?"]:
                found = self._names()
            case ["migrate_set_capability"]:
                found = [each.value for each in Capability]
            case ["migrate_set_capability", _]:
                found = ["on", "off"]
            case ["migrate_set_parameter"]:
                found = list(PARAMETERS)
            case _:
                found = []
        return [each for each in found if each.startswith(last)]

    def _names(self) -> list[str]:
        return [name for each in self._commands for name in each.names.split("|")]

    # Section: the table

    def _make_commands(self) -> list[HumanCommand]:
        machine, migrator = self._machine, self._migrator
        uri = (("uri", "s"),)
        saved = (("address", "i"), ("size", "i"), ("filename", "s"))
        row = HumanCommand
        return [
            row("help|?", "[cmd]", "show the help", (("name", "S?"),), self._help),
            row(
                "info",
                "[subcommand]",
                "show various information about the system state",
                (),
                lambda _: self._list(self._infos, "info "),
            ),
            row("stop|s", "", "stop emulation", (), lambda _: self._stop()),
            row("cont|c", "", "resume emulation", (), lambda _: machine.cont()),
            row(
                "quit|q",
                "",
                "quit the emulator",
                (),
                lambda _: machine.request_shutdown("host-qmp-quit", False),
            ),
            row("system_reset", "", "reset the system", (), lambda _: machine.reset("host-qmp-system-reset")),
            row("system_powerdown", "", "send system power down event", (), lambda _: self._powerdown()),
            row("nmi", "", "inject an NMI", (), lambda _: machine.inject_nmi()),
            row(
                "memsave",
                "addr size file",
                "save to disk virtual memory dump starting at 'addr' of size 'size'",
                saved,
                lambda arguments: memory.save_virtual(machine, **arguments),
            ),
            row(
                "pmemsave",
                "addr size file",
                "save to disk physical memory dump starting at 'addr' of size 'size'",
                saved,
                lambda arguments: memory.save_physical(machine, **arguments),
            ),
            row(
                "sendkey",
                "keys [hold_ms]",
                "send keys to the VM (e.g. 'sendkey ctrl-alt-f1', default hold time=100 ms)",
                (("keys", "s"), ("hold_ms", "i?")),
                lambda _: absent.no_keyboard(),
            ),
            row(
                "balloon",
                "target",
                "request VM to change its memory allocation (in MB)",
                (("target", "i"),),
                lambda _: absent.no_balloon(),
            ),
            row(
                "migrate",
                "[-d] [-b] [-i] [-r] uri",
                "migrate to URI (using -d to not wait for completion)\n"
                "\t\t\t -b for migration without shared storage with full copy of disk\n"
                "\t\t\t -i for migration without shared storage with incremental copy of disk"
                " (base image shared between src and destination)\n"
                "\t\t\t -r to resume a paused migration",
                (("detach", "-d"), ("blk", "-b"), ("inc", "-i"), ("resume", "-r"), *uri),
                self._migrate,
            ),
            row("migrate_cancel", "", "cancel the current VM migration", (), lambda _: migrator.cancel()),
            row(
                "migrate_continue",
                "state",
                "Continue migration from the given paused state",
                (("state", "s"),),
                self._continue,
            ),
            row(
                "migrate_incoming",
                "uri",
                "Continue an incoming migration from an -incoming defer",
                uri,
                lambda arguments: migrator.incoming(arguments["uri"], fds=self._fds),
            ),
            row(
                "migrate_pause",
                "",
                "Pause an ongoing migration (postcopy-only)",
                (),
                lambda _: migrator.pause(),
            ),
            row(
                "migrate_recover",
                "uri",
                "Continue a paused incoming postcopy migration",
                uri,
                lambda arguments: migrator.recover(arguments["uri"], fds=self._fds),
            ),
            row(
                "migrate_set_capability",
                "capability state",
                "Enable/Disable the usage of a capability for migration",
                (("capability", "s"), ("state", "b")),
                self._set_capability,
            ),
            row(
                "migrate_set_parameter",
                "parameter value",
                "Set the parameter for migration",
                (("parameter", "s"), ("value", "s")),
                self._set_parameter,
            ),
            row(
                "migrate_start_postcopy",
                "",
                "Followup to a migration command to switch the migration to postcopy mode. The postcopy-ram"
                " capability must be set on both source and destination before the original migration"
                " command .",
                (),
                lambda _: migrator.start_postcopy(),
            ),
        ]

    # Section: handlers with more than a call

    def _help(self, arguments: Arguments) -> str:
        words = (arguments["name"] or "").split()
        if words[:1] == ["info"]:
            chosen = [each for each in self._infos if words[1:2] in ([], [each.names])]
            return self._list(chosen, "info ")
        if not words:
            return self._list(self._commands)
        found = [each for each in self._commands if each.matches(words[0])]
        return self._list(found) or f"unknown command: '{words[0]}'\n"

    @staticmethod
    def _list(commands: list[HumanCommand], prefix: str = "") -> str:
        return "".join(command.line(prefix) for command in commands)

    def _stop(self) -> None:
        self._machine.stop(wait_s=STOP_WAIT_S)

    def _migrate(self, arguments: Arguments) -> str:
        self._migrator.migrate(
            arguments["uri"],
            resume=arguments["resume"],
            blk=arguments["blk"],
            inc=arguments["inc"],
            fds=self._fds,
        )
        if arguments["detach"]:
            return ""
        if self._wait_until is not None:
            self._wait_until(self._has_migrated)
            return ""
        return "terminal does not allow synchronous migration, continuing detached\n"

    def _has_migrated(self) -> bool:
        return self._migrator.query().get("status") not in _UNDER_WAY

    def _continue(self, arguments: Arguments) -> None:
        _known(arguments["state"], {status.value for status in MigrationStatus})
        self._migrator.continue_(arguments["state"])

    def _set_capability(self, arguments: Arguments) -> None:
        _known(arguments["capability"], {each.value for each in Capability} | set(ALIASES))
        self._migrator.set_capabilities([arguments])

    def _set_parameter(self, arguments: Arguments) -> None:
        name = arguments["parameter"]
        _known(name, set(PARAMETERS))
        self._migrator.set_parameters({name: PARAMETERS[name].from_text(arguments["value"])})


def _show(show: Callable[[human_info.InfoSources], str], info: human_info.InfoSources, _: Arguments) -> str:
    return show(info)


def _known(value: str, values: set[str]) -> None:
    if value not in values:
        raise PageferryError(f"invalid parameter value: {value}")


def _parse(command: HumanCommand, rest: str) -> Arguments:
    """The arguments of a command, or _BadArguments with QEMU's text."""
    arguments: Arguments = {name: False for name, kind in command.parameters if kind[0] == "-"}
    flags = {kind[1:]: name for name, kind in command.parameters if kind[0] == "-"}
    rest = rest.lstrip()
    while flags and rest.startswith("-"):
        flag, _, tail = rest[1:].partition(" ")
        if flag[:1] not in flags:
            raise _BadArguments(f"{command.names}: unsupported option -{flag[:1]}")
        if len(flag) > 1:
            raise _BadArguments(f"{command.names}: extraneous characters at the end of line")
        arguments[flags[flag]] = True
        rest = tail.lstrip()
    for name, kind in command.parameters:
        if kind[0] == "-":
            continue
        if kind[0] == "S":
            arguments[name], rest = rest or None, ""
            continue
        match = _WORD.match(rest)
        if match is None and kind[0] == "i":
            if kind == "i?":
                arguments[name] = None
                continue
            raise _BadArguments("unexpected end of expression")
        if match is None:
            raise _BadArguments(f"{command.names}: string expected")
        rest = rest[match.end() :].lstrip()
        word = match["word"] if match["quoted"] is None else _unquote(match["quoted"])
        if kind == "b":
            if word not in ("on", "off"):
                raise _BadArguments("Expected 'on' or 'off'")
            arguments[name] = word == "on"
        elif kind[0] == "i":
            arguments[name] = _number(word)
        else:
            arguments[name] = word
    if rest:
        raise _BadArguments(f"{command.names}: extraneous characters at the end of line")
    return arguments


def _number(word: str) -> int:
    """As C writes it; QEMU's other expressions are not understood."""
    if not word[:1].isdigit() and word[:1] != "-":
        raise _BadArguments(f"invalid char '{word[:1]}' in expression")
    try:
        return int(re.sub(r"^(-?)0([0-7]+)$", r"\g<1>0o\2", word), 0)
    except ValueError:
        raise _BadArguments(f"'{word}' is not a number") from None


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text)
