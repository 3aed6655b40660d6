"""Handlers of schema/migration.json."""

from __future__ import annotations

from qmp.dispatcher import Call, Handler
from vmm.control.interfaces import MigratorControl
from vmm.migration.errors import MigrationRefused

__all__ = ["handlers"]


def handlers(migrator: MigratorControl) -> dict[str, Handler]:
    """Command name -> handler."""

    def migrate(call: Call) -> None:
        arguments = call.arguments
        migrator.migrate(
            arguments["uri"],
            resume=arguments.get("resume", False),
            blk=arguments.get("blk", False),
            inc=arguments.get("inc", False),
            fds=call.client.fds,
        )

    def incoming(call: Call) -> None:
        exit_on_error = call.arguments.get("exit-on-error")
        migrator.incoming(call.arguments["uri"], exit_on_error=exit_on_error, fds=call.client.fds)

    def take_back(call: Call) -> None:
        if not call.arguments["destination-is-gone"]:
            raise MigrationRefused("Parameter 'destination-is-gone' expects true: no guest may run twice")
        migrator.take_back()

    return {
        "migrate": migrate,
        "migrate-incoming": incoming,
        "migrate_cancel": lambda call: migrator.cancel(),
        "migrate-start-postcopy": lambda call: migrator.start_postcopy(),
        "migrate-continue": lambda call: migrator.continue_(call.arguments["state"]),
        "migrate-recover": lambda call: migrator.recover(call.arguments["uri"], fds=call.client.fds),
        "migrate-pause": lambda call: migrator.pause(),
        "x-migrate-take-back": take_back,
        "migrate-set-capabilities": lambda call: migrator.set_capabilities(call.arguments["capabilities"]),
        "query-migrate-capabilities": lambda call: migrator.query_capabilities(),
        "migrate-set-parameters": lambda call: migrator.set_parameters(call.arguments),
        "query-migrate-parameters": lambda call: migrator.query_parameters(),
        "query-migrate": lambda call: migrator.query(),
    }
