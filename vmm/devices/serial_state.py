"""The UART's state on the wire: section `serial`, version 3, as stock's isa-serial sends it.

    Uart --save--> values --vmm.vmstate--> bytes            bytes --vmm.vmstate--> values --load--> Uart

Source: QEMU 7.2 hw/char/serial.c (vmstate_serial and its subsections), hw/char/serial-isa.c.
"""

from __future__ import annotations

from vmm.devices.fifo import FIFO_DESCRIPTION
from vmm.devices.serial_registers import FCR_KEPT, IER_THRI, IIR_ID, IIR_THRI, LSR_TEMT
from vmm.devices.serial_uart import Uart
from vmm.errors import VMStateError
from vmm.vmstate import Description, Field, Subsection, Values

__all__ = ["RECV_FIFO", "SERIAL_DESCRIPTION", "THR_IPENDING", "TSR", "XMIT_FIFO", "load", "save"]

THR_IPENDING = "serial/thr_ipending"
TSR = "serial/tsr"
RECV_FIFO = "serial/recv_fifo"
XMIT_FIFO = "serial/xmit_fifo"
FIFO_TIMEOUT_TIMER = "serial/fifo_timeout_timer"
TIMEOUT_IPENDING = "serial/timeout_ipending"
POLL = "serial/poll"


def _optional(name: str, *fields: Field) -> Subsection:
    # The device puts in what is needed; present is needed.
    return Subsection(Description(name, 1, 1, fields), lambda values: name in values)


_STATE = Description(
    "serial",
    3,
    2,
    (
        Field("divider", "uint16", since=2),
        Field("rbr", "uint8"),
        Field("ier", "uint8"),
        Field("iir", "uint8"),
        Field("lcr", "uint8"),
        Field("mcr", "uint8"),
        Field("lsr", "uint8"),
        Field("msr", "uint8"),
        Field("scr", "uint8"),
        Field("fcr_vmstate", "uint8", since=3),
    ),
    (
        _optional(THR_IPENDING, Field("thr_ipending", "int32")),
        _optional(TSR, Field("tsr_retry", "uint32"), Field("thr", "uint8"), Field("tsr", "uint8")),
        _optional(RECV_FIFO, Field("recv_fifo", "struct", struct=FIFO_DESCRIPTION)),
        _optional(XMIT_FIFO, Field("xmit_fifo", "struct", struct=FIFO_DESCRIPTION)),
        _optional(FIFO_TIMEOUT_TIMER, Field("fifo_timeout_timer", "timer")),
        _optional(TIMEOUT_IPENDING, Field("timeout_ipending", "int32")),
        _optional(POLL, Field("poll_msl", "int32"), Field("modem_status_poll", "timer")),
    ),
)

SERIAL_DESCRIPTION = Description("serial", 3, 2, (Field("state", "struct", struct=_STATE),))


def save(uart: Uart) -> Values:
    """The section's values; a subsection is there if it differs from what its absence means."""
    values: Values = {
        "divider": uart.divider,
        "rbr": uart.rbr,
        "ier": uart.ier,
        "iir": uart.iir,
        "lcr": uart.lcr,
        "mcr": uart.mcr,
        "lsr": uart.lsr,
        "msr": uart.msr,
        "scr": uart.scr,
        "fcr_vmstate": uart.fcr,
    }
    if uart.ier & IER_THRI and uart.thr_ipending != (uart.iir & IIR_ID == IIR_THRI):
        values[THR_IPENDING] = {"thr_ipending": int(uart.thr_ipending)}
    if uart.tsr_retry:
        values[TSR] = {"tsr_retry": uart.tsr_retry, "thr": uart.thr, "tsr": uart.tsr}
    if uart.recv.count:
        values[RECV_FIFO] = {"recv_fifo": uart.recv.save()}
    if uart.xmit.count:
        values[XMIT_FIFO] = {"xmit_fifo": uart.xmit.save()}
    if uart.timeout_at_ns is not None:
        values[FIFO_TIMEOUT_TIMER] = {"fifo_timeout_timer": uart.timeout_at_ns}
    if uart.timeout_ipending:
        values[TIMEOUT_IPENDING] = {"timeout_ipending": 1}
    return {"state": values}


def load(uart: Uart, values: Values) -> None:
    """Set a UART that was just cleared; VMStateError leaves it half set, to be cleared again."""
    state = values["state"]
    tsr = state.get(TSR, {"tsr_retry": 0, "thr": 0, "tsr": 0})
    busy = not state["lsr"] & LSR_TEMT
    if busy != bool(tsr["tsr_retry"]):
        expected = "TSR waiting exactly while TEMT is clear"
        raise VMStateError("Inconsistent state", "serial.lsr", expected=expected, got=f"{state['lsr']:#x}")
    for name, fifo in ((RECV_FIFO, uart.recv), (XMIT_FIFO, uart.xmit)):
        if name in state:
            fifo.load(state[name][name.partition("/")[2]], name)
    uart.divider, uart.rbr, uart.scr = state["divider"], state["rbr"], state["scr"]
    uart.ier, uart.iir = state["ier"] & 0x0F, state["iir"]
    uart.lcr, uart.mcr = state["lcr"], state["mcr"] & 0x1F
    uart.lsr, uart.msr = state["lsr"], state["msr"]
    uart.set_fcr(state.get("fcr_vmstate", 0) & FCR_KEPT)
    pending = state.get(THR_IPENDING, {"thr_ipending": int(uart.iir & IIR_ID == IIR_THRI)})
    uart.thr_ipending = bool(pending["thr_ipending"])
    uart.tsr_retry = 1 if busy else 0
    uart.thr, uart.tsr = tsr["thr"], tsr["tsr"]
    timer = state.get(FIFO_TIMEOUT_TIMER, {"fifo_timeout_timer": -1})["fifo_timeout_timer"]
    uart.arm_timeout(None if timer < 0 else timer)
    timeout = state.get(TIMEOUT_IPENDING, {"timeout_ipending": 0})
    uart.timeout_ipending = bool(timeout["timeout_ipending"])
    # `poll` is about the host's modem lines at the source; there are none here.
