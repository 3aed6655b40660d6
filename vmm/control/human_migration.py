"""The human monitor's commands about migration."""

from __future__ import annotations

from typing import Final

from vmm.control.human_line import Arguments, Caller, HumanCommand
from vmm.control.interfaces import MigratorControl
from vmm.errors import PageferryError
from vmm.migration.params import ALIASES, PARAMETERS, Capability
from vmm.migration.status import MigrationStatus

__all__ = ["migration_commands"]

_UNDER_WAY: Final = ("setup", "active", "pre-switchover", "device", "cancelling")


def migration_commands(migrator: MigratorControl) -> list[HumanCommand]:
    """Their rows. Nothing here blocks: `migrate` goes on in the background, as with -d."""
    row = HumanCommand
    return [
        row(
            "migrate",
            "migrate to URI (using -d to not wait for completion)\n"
            "\t\t\t -b for migration without shared storage with full copy of disk\n"
            "\t\t\t -i for migration without shared storage with incremental copy of disk"
            " (base image shared between src and destination)\n"
            "\t\t\t -r to resume a paused migration",
            lambda arguments, caller: _migrate(migrator, arguments, caller),
            "[-d] [-b] [-i] [-r] uri",
            "detach:-d,blk:-b,inc:-i,resume:-r,uri:s",
        ),
        row("migrate_cancel", "cancel the current VM migration", lambda *_: migrator.cancel()),
        row(
            "migrate_continue",
            "Continue migration from the given paused state",
            lambda arguments, _: _continue(migrator, **arguments),
            "state",
            "state:s",
        ),
        row(
            "migrate_incoming",
            "Continue an incoming migration from an -incoming defer",
            lambda arguments, caller: migrator.incoming(arguments["uri"], fds=caller.fds),
            "uri",
            "uri:s",
        ),
        row("migrate_pause", "Pause an ongoing migration (postcopy-only)", lambda *_: migrator.pause()),
        row(
            "migrate_recover",
            "Continue a paused incoming postcopy migration",
            lambda arguments, caller: migrator.recover(arguments["uri"], fds=caller.fds),
            "uri",
            "uri:s",
        ),
        row(
            "migrate_set_capability",
            "Enable/Disable the usage of a capability for migration",
            lambda arguments, _: _set_capability(migrator, arguments),
            "capability state",
            "capability:s,state:b",
        ),
        row(
            "migrate_set_parameter",
            "Set the parameter for migration",
            lambda arguments, _: _set_parameter(migrator, **arguments),
            "parameter value",
            "parameter:s,value:s",
        ),
        row(
            "migrate_start_postcopy",
            "Followup to a migration command to switch the migration to postcopy mode. The postcopy-ram"
            " capability must be set on both source and destination before the original migration"
            " command .",
            lambda *_: migrator.start_postcopy(),
        ),
    ]


def _migrate(migrator: MigratorControl, arguments: Arguments, caller: Caller) -> str:
    migrator.migrate(
        arguments["uri"],
        resume=arguments["resume"],
        blk=arguments["blk"],
        inc=arguments["inc"],
        fds=caller.fds,
    )
    if arguments["detach"]:
        return ""
    if caller.wait_until is not None:
        caller.wait_until(lambda: migrator.query().get("status") not in _UNDER_WAY)
        return ""
    return "terminal does not allow synchronous migration, continuing detached\n"


def _continue(migrator: MigratorControl, state: str) -> None:
    _check_known(state, {status.value for status in MigrationStatus})
    migrator.continue_(state)


def _set_capability(migrator: MigratorControl, arguments: Arguments) -> None:
    _check_known(arguments["capability"], {each.value for each in Capability} | set(ALIASES))
    migrator.set_capabilities([arguments])


def _set_parameter(migrator: MigratorControl, parameter: str, value: str) -> None:
    _check_known(parameter, set(PARAMETERS))
    migrator.set_parameters({parameter: PARAMETERS[parameter].from_text(value)})


def _check_known(value: str, values: set[str]) -> None:
    """Raises PageferryError with QEMU's text."""
    if value not in values:
        raise PageferryError(f"invalid parameter value: {value}")
