"""A 16550A UART: registers, both FIFOs, interrupts, loopback, and what of it travels.

    guest --THR--> xmit FIFO --TSR--> backend.write          backend --receive--> recv FIFO --RBR--> guest

A byte leaves as soon as the backend takes it. When the backend is full the byte stays in TSR, the FIFO fills,
and the guest sees THR busy; `backend_writable` goes on from there. In that state the UART can be saved: the
bytes travel in `tsr` and `xmit_fifo`, so none is lost or doubled.

A guest that prints does so without Python (vmm/cpu/uart.c): while nothing is in the way, the vCPU's thread
has the registers for output and a buffer. Whoever takes the lock here takes them back first, and gives on
what is in the buffer; a timer does so every millisecond while there is output.

Rules:
1. One lock guards the registers: the guest's accesses come on the vCPU's thread, bytes and room on others.
2. No call here waits. The backend's methods neither wait nor call back while they run.
3. Reading LSR has a side effect only while BI or OE is set. At all other times its value is published for the
   engine to answer by itself, so that a guest polling for room needs no Python.

Sources: National Semiconductor PC16550D data sheet; QEMU 7.2 hw/char/serial.c, whose behaviour is followed
but for one thing: QEMU drops a byte after four failed writes, this UART keeps it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vmm.devices.char_sink import CharSink, NullSink
from vmm.devices.fifo import Fifo
from vmm.devices.held_output import HeldOutput
from vmm.devices.serial_registers import (
    BAUD_BASE,
    FCR_FE,
    FCR_KEPT,
    FCR_RFR,
    FCR_XFR,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_CTI,
    IIR_FE,
    IIR_ID,
    IIR_MSI,
    IIR_NO_INT,
    IIR_RDI,
    IIR_RLSI,
    IIR_THRI,
    LCR_DLAB,
    LSR_BI,
    LSR_DR,
    LSR_INT_ANY,
    LSR_OE,
    LSR_TEMT,
    LSR_THRE,
    MCR_LOOP,
    MCR_OUT2,
    MSR_ANY_DELTA,
    MSR_IDLE,
    RESET_DIVIDER,
    TRIGGER_LEVELS,
)
from vmm.devices.serial_state import (
    FIFO_TIMEOUT_TIMER,
    RECV_FIFO,
    SERIAL_DESCRIPTION,
    THR_IPENDING,
    TIMEOUT_IPENDING,
    TSR,
    XMIT_FIFO,
)
from vmm.errors import VMStateError
from vmm.vmstate import Values

__all__ = ["Serial"]


OUTPUT_NS = 1_000_000
"""How long a byte may stay in the buffer."""


class FastPath(Protocol):
    """The vCPU's side: see `Engine.take_uart` and `Engine.give_uart`."""

    def take_uart(self) -> Any: ...
    def give_uart(self, registers: Mapping[str, int]) -> None: ...


class _Registers:
    """The lock: who holds it has the registers."""

    def __init__(self, take: Callable[[], None], give: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._take = take
        self._give = give

    def __enter__(self) -> None:
        self._lock.acquire()
        self._take()

    def __exit__(self, *error: object) -> None:
        self._give()
        self._lock.release()


class Serial:
    """One UART. The bus calls `write_port` and `read_port`, the backend `receive` and `backend_writable`."""

    idstr = "serial"
    instance_id = 0
    description = SERIAL_DESCRIPTION

    def __init__(
        self,
        sink: CharSink | None = None,
        now_ns: Callable[[], int] = lambda: 0,
        publish_lsr: Callable[[int | None], None] = lambda value: None,
        set_irq: Callable[[bool], None] = lambda level: None,
        set_timer: Callable[[int | None], None] = lambda at_ns: None,
        set_output_timer: Callable[[int | None], None] = lambda at_ns: None,
        fast: FastPath | None = None,
    ) -> None:
        """`publish_lsr` gets LSR's value, or None while reading it changes it; `now_ns` is guest time.

        `set_timer` asks for a call of `receive_timeout` at an instant of guest time, or for none;
        `set_output_timer` likewise of `flush_output`. Without `fast` all is done here.
        """
        self._output = HeldOutput(sink or NullSink())
        self._now_ns = now_ns
        self._publish_lsr = publish_lsr
        self._set_irq = set_irq
        self._set_timer = set_timer
        self._set_output_timer = set_output_timer
        self._fast = fast
        self._given = False
        self._streams = False
        self._lock = _Registers(self._take, self._give)  # protects everything below
        self._published: int | None = None
        self._irq = False
        self._clear()

    @property
    def sink(self) -> CharSink:
        """Where the output goes."""
        return self._output.sink

    @sink.setter
    def sink(self, sink: CharSink) -> None:
        self._output.sink = sink

    def _clear(self) -> None:
        self._divider = RESET_DIVIDER
        self._rbr = self._thr = self._tsr = self._ier = self._lcr = self._scr = self._fcr = 0
        self._iir = IIR_NO_INT
        self._mcr = MCR_OUT2
        self._lsr = LSR_TEMT | LSR_THRE
        self._msr = MSR_IDLE
        self._thr_ipending = False
        self._timeout_ipending = False
        self._arm_timeout(None)
        self._streams = False
        self._set_output_timer(None)
        self._tsr_retry = 0
        self._trigger_level = TRIGGER_LEVELS[0]
        self._recv = Fifo()
        self._xmit = Fifo()

    def reset(self) -> None:
        """As after power-on. What waited for the backend is gone."""
        with self._lock:
            self._clear()
            self._update_irq()
        self.sink.accept_input()

    # ---- the backend's side: any thread ----

    def can_receive(self) -> int:
        """How many bytes `receive` takes without an overrun."""
        with self._lock:
            if not self._fcr & FCR_FE:
                return 0 if self._lsr & LSR_DR else 1
            if self._recv.is_full:
                return 0
            # Up to the trigger level at once, then singly: the guest is told before the FIFO is full.
            return max(1, self._trigger_level - self._recv.count)

    def receive(self, data: bytes) -> None:
        """Bytes from outside; those that do not fit are lost, and the guest is told (overrun)."""
        with self._lock:
            if not self._mcr & MCR_LOOP:
                self._receive(data)
                self._update_irq()

    def hold_output(self) -> None:
        """The guest is to stop: what it still says is kept. Any thread."""
        with self._lock:
            self._output.hold()

    def release_output(self) -> None:
        """It goes on, or leaves: give out what was kept. Any thread."""
        with self._lock:
            self._output.release()
        self.backend_writable()

    def backend_writable(self) -> None:
        """The backend has room again."""
        with self._lock:
            if self._output.flush() and self._tsr_retry:
                self._transmit()
                self._update_irq()

    def flush_output(self) -> None:
        """Give on what the guest has sent by itself; once more soon if there was something. Any thread."""
        with self._lock:
            if self._streams:
                self._streams = self._has_sent
                self._set_output_timer(self._now_ns() + OUTPUT_NS if self._streams else None)

    @property
    def is_idle(self) -> bool:
        """No byte of the guest waits for the backend."""
        with self._lock:
            return bool(self._lsr & LSR_TEMT)

    def _take(self) -> None:
        self._has_sent = False
        if self._fast is None or not self._given:
            return
        uart = self._fast.take_uart()
        self._given = False
        self._ier, self._thr_ipending = uart.ier, bool(uart.thr_ipending)
        self._irq = bool(self._ier & IER_THRI and self._thr_ipending)
        self._iir = self._iir & 0xF0 | (IIR_THRI if self._irq else IIR_NO_INT)
        if uart.count:
            self._has_sent = True
            self._thr = self._tsr = uart.output[uart.count - 1]
            self._output.put(bytes(uart.output[0 : uart.count]))

    def _give(self) -> None:
        is_redirected = self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or self._msr & MSR_ANY_DELTA
        is_busy = self._lsr != LSR_THRE | LSR_TEMT or self._tsr_retry or self._timeout_ipending
        if self._fast is None or is_redirected or is_busy:
            return
        registers = {
            "is_open": 1,
            "takes_output": int(self._streams and self._output.goes_through),
            "ier": self._ier,
            "thr_ipending": int(self._thr_ipending),
            "msr": self._msr,
            "iir_fifo": self._iir & 0xF0,
        }
        self._fast.give_uart(registers)
        self._given = True

    def _receive(self, data: bytes) -> None:
        if self._fcr & FCR_FE:
            for byte in data:
                if self._recv.is_full:
                    self._lsr |= LSR_OE
                else:
                    self._recv.push(byte)
            self._lsr |= LSR_DR
            self._arm_timeout(self._now_ns() + 4 * self._character_ns())
        elif data:
            if self._lsr & LSR_DR:
                self._lsr |= LSR_OE
            self._rbr = data[-1]
            self._lsr |= LSR_DR

    def _transmit(self) -> None:
        while True:
            if not self._tsr_retry:
                if not self._fcr & FCR_FE:
                    self._tsr = self._thr
                elif self._xmit.count:
                    self._tsr = self._xmit.pop()
                else:  # only a peer's odd state leads here: nothing to send after all
                    self._lsr |= LSR_THRE | LSR_TEMT
                    return
                if not (self._fcr & FCR_FE and self._xmit.count):
                    self._lsr |= LSR_THRE
                    self._thr_ipending = True
            if self._mcr & MCR_LOOP:
                self._receive(bytes((self._tsr,)))
            elif not self._output.write_nowait(bytes((self._tsr,))):
                self._tsr_retry = 1  # stock counts to 4 and gives up; 1 says "waiting" to both
                return
            self._tsr_retry = 0
            if self._lsr & LSR_THRE:
                self._lsr |= LSR_TEMT
                return

    # ---- the guest's side: the vCPU's thread ----

    def write_port(self, offset: int, size: int, value: int) -> None:
        """OUT to one of the eight registers."""
        with self._lock:
            self._WRITE[offset](self, value)
            self._update_irq()

    def read_port(self, offset: int) -> int:
        """IN from one of the eight registers."""
        with self._lock:
            self._run_timeout()
            value = self._READ[offset](self)
            self._update_irq()
        if offset == 0:
            self.sink.accept_input()
        return value

    def _write_thr(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divider = self._divider & 0xFF00 | value
            return
        self._thr = value
        if self._fcr & FCR_FE:
            if self._xmit.is_full:
                self._xmit.pop()  # the guest did not look at THRE: the oldest byte goes, as in QEMU
            self._xmit.push(value)
        self._thr_ipending = False
        self._lsr &= ~(LSR_THRE | LSR_TEMT)
        if not self._tsr_retry:
            self._transmit()
        if self._fast is not None and not self._streams:
            self._streams = True
            self._set_output_timer(self._now_ns() + OUTPUT_NS)

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divider = self._divider & 0x00FF | value << 8
            return
        changed = (self._ier ^ value) & 0x0F
        self._ier = value & 0x0F
        if changed & IER_THRI:
            # Turning THRI on while THRE is set raises it.
            self._thr_ipending = bool(self._ier & IER_THRI and self._lsr & LSR_THRE)

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_FE:
            value |= FCR_RFR | FCR_XFR
        if value & FCR_RFR:
            self._lsr &= ~(LSR_DR | LSR_BI)
            self._arm_timeout(None)
            self._timeout_ipending = False
            self._recv.clear()
        if value & FCR_XFR:
            self._lsr |= LSR_THRE
            if not self._tsr_retry:
                self._lsr |= LSR_TEMT
            self._thr_ipending = True
            self._xmit.clear()
        self._set_fcr(value & FCR_KEPT)

    def _set_fcr(self, value: int) -> None:
        self._fcr = value
        self._trigger_level = TRIGGER_LEVELS[value >> 6]
        if value & FCR_FE:
            self._iir |= IIR_FE
        else:
            self._iir &= ~IIR_FE

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F

    def _write_nothing(self, value: int) -> None:
        return None

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _read_rbr(self) -> int:
        if self._lcr & LCR_DLAB:
            return self._divider & 0xFF
        if not self._fcr & FCR_FE:
            self._lsr &= ~(LSR_DR | LSR_BI)
            return self._rbr
        value = self._recv.pop() if self._recv.count else 0
        if self._recv.count:
            self._arm_timeout(self._now_ns() + 4 * self._character_ns())
        else:
            self._lsr &= ~(LSR_DR | LSR_BI)
            self._arm_timeout(None)
        self._timeout_ipending = False
        return value

    def _read_ier(self) -> int:
        return self._divider >> 8 if self._lcr & LCR_DLAB else self._ier

    def _read_iir(self) -> int:
        value = self._iir
        if value & IIR_ID == IIR_THRI:
            self._thr_ipending = False
        return value

    def _read_lsr(self) -> int:
        value = self._lsr
        self._lsr &= ~(LSR_BI | LSR_OE)
        return value

    def _read_msr(self) -> int:
        if self._mcr & MCR_LOOP:  # the outputs are the inputs
            return (self._mcr & 0x0C) << 4 | (self._mcr & 0x02) << 3 | (self._mcr & 0x01) << 5
        value = self._msr
        self._msr &= ~MSR_ANY_DELTA
        return value

    _WRITE = (
        _write_thr,
        _write_ier,
        _write_fcr,
        _write_lcr,
        _write_mcr,
        _write_nothing,
        _write_nothing,
        _write_scr,
    )
    _READ = (
        _read_rbr,
        _read_ier,
        _read_iir,
        lambda self: self._lcr,
        lambda self: self._mcr,
        _read_lsr,
        _read_msr,
        lambda self: self._scr,
    )

    # ---- interrupts and the receive timeout ----

    def _update_irq(self) -> None:
        cause = IIR_NO_INT
        if self._ier & IER_RLSI and self._lsr & LSR_INT_ANY:
            cause = IIR_RLSI
        elif self._ier & IER_RDI and self._timeout_ipending:
            cause = IIR_CTI
        elif self._ier & IER_RDI and self._is_triggered():
            cause = IIR_RDI
        elif self._ier & IER_THRI and self._thr_ipending:
            cause = IIR_THRI
        elif self._ier & IER_MSI and self._msr & MSR_ANY_DELTA:
            cause = IIR_MSI
        self._iir = self._iir & 0xF0 | cause
        irq = cause != IIR_NO_INT
        if irq != self._irq:
            self._irq = irq
            self._set_irq(irq)
        plain = None if self._lsr & (LSR_BI | LSR_OE) else self._lsr
        if plain != self._published:
            self._published = plain
            self._publish_lsr(plain)

    def _is_triggered(self) -> bool:
        if not self._lsr & LSR_DR:
            return False
        return not self._fcr & FCR_FE or self._recv.count >= self._trigger_level

    def _arm_timeout(self, at_ns: int | None) -> None:
        self._timeout_at_ns: int | None = at_ns
        self._set_timer(at_ns)

    def receive_timeout(self) -> None:
        """The time may be over after which bytes below the trigger level are told of, too."""
        with self._lock:
            self._run_timeout()

    def _run_timeout(self) -> None:
        if self._timeout_at_ns is not None and self._now_ns() >= self._timeout_at_ns:
            self._arm_timeout(None)
            if self._recv.count:
                self._timeout_ipending = True
                self._update_irq()

    def _character_ns(self) -> int:
        bits = 1 + 5 + (self._lcr & 3) + (1 if self._lcr & 8 else 0) + (2 if self._lcr & 4 else 1)
        divider = self._divider if 0 < self._divider <= BAUD_BASE else RESET_DIVIDER
        return 1_000_000_000 * divider // BAUD_BASE * bits

    # ---- what travels ----

    def save(self) -> Values:
        """The section's values; a subsection is there if it differs from what its absence means."""
        with self._lock:
            return {"state": self._save()}

    def _save(self) -> Values:
        values: Values = {
            "divider": self._divider,
            "rbr": self._rbr,
            "ier": self._ier,
            "iir": self._iir,
            "lcr": self._lcr,
            "mcr": self._mcr,
            "lsr": self._lsr,
            "msr": self._msr,
            "scr": self._scr,
            "fcr_vmstate": self._fcr,
        }
        if self._ier & IER_THRI and self._thr_ipending != (self._iir & IIR_ID == IIR_THRI):
            values[THR_IPENDING] = {"thr_ipending": int(self._thr_ipending)}
        if self._tsr_retry:
            values[TSR] = {"tsr_retry": self._tsr_retry, "thr": self._thr, "tsr": self._tsr}
        if self._recv.count:
            values[RECV_FIFO] = {"recv_fifo": self._recv.save()}
        if self._xmit.count:
            values[XMIT_FIFO] = {"xmit_fifo": self._xmit.save()}
        if self._timeout_at_ns is not None:
            values[FIFO_TIMEOUT_TIMER] = {"fifo_timeout_timer": self._timeout_at_ns}
        if self._timeout_ipending:
            values[TIMEOUT_IPENDING] = {"timeout_ipending": 1}
        return values

    def load(self, values: Values, version: int) -> None:
        """Take a saved state over; VMStateError leaves the UART as after a reset."""
        with self._lock:
            self._clear()
            try:
                self._load(values["state"])
            except VMStateError:
                self._clear()
                raise
            finally:
                self._update_irq()
        self.backend_writable()
        self.sink.accept_input()

    def _load(self, state: Values) -> None:
        tsr = state.get(TSR, {"tsr_retry": 0, "thr": 0, "tsr": 0})
        busy = not state["lsr"] & LSR_TEMT
        if busy != bool(tsr["tsr_retry"]):
            expected = "TSR waiting exactly while TEMT is clear"
            raise VMStateError(
                "Inconsistent state", "serial.lsr", expected=expected, got=f"{state['lsr']:#x}"
            )
        for name, fifo in ((RECV_FIFO, self._recv), (XMIT_FIFO, self._xmit)):
            if name in state:
                fifo.load(state[name][name.partition("/")[2]], name)
        self._divider, self._rbr, self._scr = state["divider"], state["rbr"], state["scr"]
        self._ier, self._iir = state["ier"] & 0x0F, state["iir"]
        self._lcr, self._mcr = state["lcr"], state["mcr"] & 0x1F
        self._lsr, self._msr = state["lsr"], state["msr"]
        self._set_fcr(state.get("fcr_vmstate", 0) & FCR_KEPT)
        pending = state.get(THR_IPENDING, {"thr_ipending": int(self._iir & IIR_ID == IIR_THRI)})
        self._thr_ipending = bool(pending["thr_ipending"])
        self._tsr_retry = 1 if busy else 0
        self._thr, self._tsr = tsr["thr"], tsr["tsr"]
        timer = state.get(FIFO_TIMEOUT_TIMER, {"fifo_timeout_timer": -1})["fifo_timeout_timer"]
        self._arm_timeout(None if timer < 0 else timer)
        self._timeout_ipending = bool(
            state.get(TIMEOUT_IPENDING, {"timeout_ipending": 0})["timeout_ipending"]
        )
        # `poll` is about the host's modem lines at the source; there are none here.
