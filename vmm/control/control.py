"""Handlers of schema/control.json."""

from __future__ import annotations

from typing import Any

from qmp.dispatcher import Call, Dispatcher, Handler
from qmp.errors import GenericError
from vmm.control.human import HumanMonitor
from vmm.control.interfaces import MachineControl

__all__ = ["handlers"]


def handlers(dispatcher: Dispatcher, machine: MachineControl, human: HumanMonitor) -> dict[str, Handler]:
    """Command name -> handler."""

    def qmp_capabilities(call: Call) -> None:
        call.client.session.negotiate(call.arguments.get("enable", []))

    def query_commands() -> list[dict[str, Any]]:
        return [{"name": name} for name in dispatcher.names]

    def quit_(call: Call) -> None:
        machine.request_shutdown("host-qmp-quit", False)

    def getfd(call: Call) -> None:
        call.client.fds.name_received(call.arguments["fdname"])

    def closefd(call: Call) -> None:
        call.client.fds.close_named(call.arguments["fdname"])

    def add_fd(call: Call) -> dict[str, int]:
        fd = call.client.fds.take_received()
        return dispatcher.fdsets.add(fd, call.arguments.get("fdset-id"), call.arguments.get("opaque"))

    def remove_fd(call: Call) -> None:
        dispatcher.fdsets.remove(call.arguments["fdset-id"], call.arguments.get("fd"))

    def human_monitor_command(call: Call) -> str:
        if call.arguments.get("cpu-index", 0) != 0:
            raise GenericError("Parameter 'cpu-index' expects a CPU number")
        return human.execute(call.arguments["command-line"], call.client.fds)

    return {
        "qmp_capabilities": qmp_capabilities,
        "query-version": lambda call: dispatcher.version,
        "query-commands": lambda call: query_commands(),
        "quit": quit_,
        "getfd": getfd,
        "closefd": closefd,
        "add-fd": add_fd,
        "remove-fd": remove_fd,
        "query-fdsets": lambda call: dispatcher.fdsets.describe(),
        "human-monitor-command": human_monitor_command,
    }
