"""Handlers of schema/run-state.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from qmp.dispatcher import Call, Handler
from vmm.control.interfaces import MachineControl, MigratorControl

__all__ = ["STOP_WAIT_S", "handlers", "status"]

STOP_WAIT_S: Final = 0.005
"""`stop` waits this long for the vCPU. It may be parked on a page that is still to come, which no QMP command
may wait for; the guest is stopped all the same: nothing of it is heard, and it never runs past that block."""


def handlers(
    machine: MachineControl, migrator: MigratorControl, power_down: Callable[[], None]
) -> dict[str, Handler]:
    """Command name -> handler."""

    def stop(call: Call) -> None:
        machine.stop(wait_s=STOP_WAIT_S)

    def cont(call: Call) -> None:
        machine.cont()

    def system_reset(call: Call) -> None:
        machine.reset("host-qmp-system-reset")

    def system_powerdown(call: Call) -> None:
        power_down()

    def inject_nmi(call: Call) -> None:
        machine.inject_nmi()

    return {
        "inject-nmi": inject_nmi,
        "query-status": lambda call: status(machine, migrator),
        "stop": stop,
        "cont": cont,
        "system_reset": system_reset,
        "system_powerdown": system_powerdown,
    }


def status(machine: MachineControl, migrator: MigratorControl) -> dict[str, Any]:
    """StatusInfo.

    The status stays one of QEMU's: it says what the guest may do. A vCPU that waits for a page is named; one
    whose page nobody will send does not execute, and `running` does not claim it, as QEMU's does.
    """
    state = str(machine.run_state)
    reply = {"status": state, "singlestep": False, "running": state == "running"}
    waited = None if machine.vcpu_is_paused else migrator.waited_page()
    if waited is not None:
        block, offset, is_lost = waited
        whose = ", which is at a source that is lost" if is_lost else ""
        reply["x-vcpu"] = f"waiting for page {offset:#x} of RAMBlock '{block}'{whose}"
        reply["running"] = reply["running"] and not is_lost
    return reply
