"""Handlers of schema/migration.json."""

from __future__ import annotations

from qmp.dispatcher import Call, Handler
from vmm.control.interfaces import MigratorControl

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

    return {
        "migrate": migrate,
        "migrate-incoming": lambda call: migrator.incoming(call.arguments["uri"], fds=call.client.fds),
        "migrate_cancel": lambda call: migrator.cancel(),
        "migrate-start-postcopy": lambda call: migrator.start_postcopy(),
        "migrate-continue": lambda call: migrator.continue_(call.arguments["state"]),
        "migrate-recover": lambda call: migrator.recover(call.arguments["uri"]),
        "migrate-pause": lambda call: migrator.pause(),
        "migrate-set-capabilities": lambda call: migrator.set_capabilities(call.arguments["capabilities"]),
        "query-migrate-capabilities": lambda call: migrator.query_capabilities(),
        "migrate-set-parameters": lambda call: migrator.set_parameters(call.arguments),
        "query-migrate-parameters": lambda call: migrator.query_parameters(),
        "query-migrate": lambda call: migrator.query(),
    }
