"""The human monitor's commands about the machine: life, memory, and devices that are not there."""

from __future__ import annotations

from collections.abc import Callable

from vmm.control import absent, memory
from vmm.control.human_line import Arguments, Caller, HumanCommand
from vmm.control.interfaces import MachineControl
from vmm.control.run_state import STOP_WAIT_S

__all__ = ["machine_commands"]


def machine_commands(machine: MachineControl, power_down: Callable[[], None]) -> list[HumanCommand]:
    """Their rows. `power_down` presses the power button and tells the clients."""
    row = HumanCommand

    def stop(arguments: Arguments, caller: Caller) -> None:
        machine.stop(wait_s=STOP_WAIT_S)

    return [
        row("stop|s", "stop emulation", stop),
        row("cont|c", "resume emulation", lambda *_: machine.cont()),
        row("quit|q", "quit the emulator", lambda *_: machine.request_shutdown("host-qmp-quit", False)),
        row("system_reset", "reset the system", lambda *_: machine.reset("host-qmp-system-reset")),
        row("system_powerdown", "send system power down event", lambda *_: power_down()),
        row("nmi", "inject an NMI", lambda *_: machine.inject_nmi()),
        row(
            "memsave",
            "save to disk virtual memory dump starting at 'addr' of size 'size'",
            lambda arguments, _: memory.save_virtual(machine, **arguments),
            "addr size file",
            "address:i,size:i,filename:s",
        ),
        row(
            "pmemsave",
            "save to disk physical memory dump starting at 'addr' of size 'size'",
            lambda arguments, _: memory.save_physical(machine, **arguments),
            "addr size file",
            "address:i,size:i,filename:s",
        ),
        row(
            "sendkey",
            "send keys to the VM (e.g. 'sendkey ctrl-alt-f1', default hold time=100 ms)",
            lambda *_: absent.no_keyboard(),
            "keys [hold_ms]",
            "keys:s,hold_ms:i?",
        ),
        row(
            "balloon",
            "request VM to change its memory allocation (in MB)",
            lambda *_: absent.no_balloon(),
            "target",
            "target:i",
        ),
    ]
