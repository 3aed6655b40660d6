"""The human monitor: lines in, text out, in the spelling and output shape of QEMU 7.2's.

    line --HumanCommand.parse--> arguments --handler of the row--> text

The rows are in human_machine.py and human_migration.py, those of `info` in human_info.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from qmp.errors import QmpError
from vmm.control.human_info import SUBCOMMANDS, InfoSources
from vmm.control.human_line import Arguments, BadArguments, Caller, HumanCommand, WaitUntil
from vmm.control.human_machine import machine_commands
from vmm.control.human_migration import migration_commands
from vmm.control.interfaces import FdTaker, MachineControl, MigratorControl
from vmm.control.refusals import refusal_text
from vmm.migration.params import PARAMETERS, Capability

__all__ = ["HumanMonitor"]


class HumanMonitor:
    """Executes command lines. Nothing here blocks."""

    def __init__(
        self,
        machine: MachineControl,
        migrator: MigratorControl,
        info: InfoSources,
        power_down: Callable[[], None],
    ) -> None:
        """`power_down` presses the power button and tells the clients."""
        self._infos = [
            HumanCommand(name, help_, functools.partial(_show, show, info))
            for name, help_, show in SUBCOMMANDS
        ]
        rows = [
            HumanCommand("help|?", "show the help", self._help, "[cmd]", "name:S"),
            HumanCommand(
                "info", "show various information about the system state", self._list_infos, "[subcommand]"
            ),
            *machine_commands(machine, power_down),
            *migration_commands(migrator),
        ]
        self._commands = sorted(rows, key=lambda command: command.names)

    def execute(self, line: str, fds: FdTaker | None = None, *, wait_until: WaitUntil | None = None) -> str:
        """Execute a line; what it prints, lines ended by CR LF. Errors are printed, never raised.

        For `fds` and `wait_until` see `Caller`.
        """
        return self._execute(line.strip(" \t\r\n"), Caller(fds, wait_until)).replace("\n", "\r\n")

    def _execute(self, line: str, caller: Caller) -> str:
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
            return command.handler(command.parse(rest), caller) or ""
        except BadArguments as error:
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

    # Section: the commands about the commands

    def _help(self, arguments: Arguments, _: Caller) -> str:
        words = (arguments["name"] or "").split()
        if words[:1] == ["info"]:
            chosen = [each for each in self._infos if words[1:2] in ([], [each.names])]
            return _help_lines(chosen, "info ")
        if not words:
            return _help_lines(self._commands)
        found = [each for each in self._commands if each.matches(words[0])]
        return _help_lines(found) or f"unknown command: '{words[0]}'\n"

    def _list_infos(self, *_: object) -> str:
        return _help_lines(self._infos, "info ")


def _help_lines(commands: list[HumanCommand], prefix: str = "") -> str:
    return "".join(command.line(prefix) for command in commands)


def _show(show: Callable[[InfoSources], str], info: InfoSources, *_: object) -> str:
    return show(info)
