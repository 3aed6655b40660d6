"""Handlers of schema/run-state.json."""

from __future__ import annotations

from typing import Any, Final

from qmp.dispatcher import Call, Handler
from qmp.events import EventHub
from vmm.control.interfaces import MachineControl

__all__ = ["STOP_WAIT_S", "handlers", "status"]

STOP_WAIT_S: Final = 0.005
"""`stop` waits this long for the vCPU. It may be parked on a page that is still to come, which no QMP command
may wait for; the stop then takes effect when the page is there."""


def handlers(machine: MachineControl, hub: EventHub) -> dict[str, Handler]:
    """Command name -> handler."""

    def stop(call: Call) -> None:
        machine.stop(wait_s=STOP_WAIT_S)

    def cont(call: Call) -> None:
        machine.cont()

    def system_reset(call: Call) -> None:
        machine.reset("host-qmp-system-reset")

    def system_powerdown(call: Call) -> None:
        hub.emit("POWERDOWN")

    return {
        "query-status": lambda call: status(machine),
        "stop": stop,
        "cont": cont,
        "system_reset": system_reset,
        "system_powerdown": system_powerdown,
    }


def status(machine: MachineControl) -> dict[str, Any]:
    """StatusInfo."""
    state = str(machine.run_state)
    return {"status": state, "singlestep": False, "running": state == "running"}
