"""The UART's state on the wire: section `serial`, version 3, as stock's isa-serial sends it.

Source: QEMU 7.2 hw/char/serial.c (vmstate_serial and its subsections), hw/char/serial-isa.c.
"""

from __future__ import annotations

from vmm.devices.fifo import FIFO_DESCRIPTION
from vmm.vmstate import Description, Field, Subsection

__all__ = [
    "FIFO_TIMEOUT_TIMER",
    "POLL",
    "RECV_FIFO",
    "SERIAL_DESCRIPTION",
    "THR_IPENDING",
    "TIMEOUT_IPENDING",
    "TSR",
    "XMIT_FIFO",
]

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
