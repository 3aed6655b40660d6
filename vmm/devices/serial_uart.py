"""A 16550A UART's logic: registers, both FIFOs, interrupts, loopback. It touches nothing and locks nothing.

    guest --THR--> xmit FIFO --TSR--> write                     receive --> recv FIFO --RBR--> guest

A byte leaves as soon as `write` takes it. When it is not taken the byte stays in TSR, the FIFO fills, and the
guest sees THR busy; `transmit` goes on from there. In that state the UART can be saved: the bytes travel in
`tsr` and `xmit`, so none is lost or doubled.

Rules:
1. The attributes are the data sheet's registers; whoever changes one from outside (a loaded state, output
   that the vCPU did by itself) leaves them consistent with each other, the interrupt line too.
2. Reading LSR has a side effect only while BI or OE is set. At all other times its value is published for the
   engine to answer by itself, so that a guest polling for room needs no Python.

Sources: National Semiconductor PC16550D data sheet; QEMU 7.2 hw/char/serial.c, whose behaviour is followed
but for one thing: QEMU drops a byte after four failed writes, this UART keeps it.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.devices.fifo import Fifo
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

__all__ = ["Uart"]


class Uart:
    """One UART. Whoever uses it calls one method at a time."""

    def __init__(
        self,
        now_ns: Callable[[], int],
        write: Callable[[bytes], int],
        publish_lsr: Callable[[int | None], None],
        set_irq: Callable[[bool], None],
        set_timer: Callable[[int | None], None],
    ) -> None:
        """`now_ns` is guest time, `write` says how many bytes were taken.

        `publish_lsr` gets LSR's value, or None while reading it changes it; `set_timer` asks for a call of
        `run_timeout` at an instant of guest time, or for none.
        """
        self._now_ns = now_ns
        self._write = write
        self._publish_lsr = publish_lsr
        self._set_irq = set_irq
        self._set_timer = set_timer
        self._published: int | None = None
        self.irq = False
        self.clear()

    def clear(self) -> None:
        """As after power-on, but for the interrupt line: `update_irq` sees to it."""
        self.divider = RESET_DIVIDER
        self.rbr = self.thr = self.tsr = self.ier = self.lcr = self.scr = self.fcr = 0
        self.iir = IIR_NO_INT
        self.mcr = MCR_OUT2
        self.lsr = LSR_TEMT | LSR_THRE
        self.msr = MSR_IDLE
        self.thr_ipending = False
        self.timeout_ipending = False
        self.arm_timeout(None)
        self.tsr_retry = 0
        self.trigger_level = TRIGGER_LEVELS[0]
        self.recv = Fifo()
        self.xmit = Fifo()

    # ---- bytes in and out ----

    @property
    def room(self) -> int:
        """How many bytes `receive` takes without an overrun."""
        if not self.fcr & FCR_FE:
            return 0 if self.lsr & LSR_DR else 1
        if self.recv.is_full:
            return 0
        # Up to the trigger level at once, then singly: the guest is told before the FIFO is full.
        return max(1, self.trigger_level - self.recv.count)

    def receive(self, data: bytes) -> None:
        """Bytes that came in; those that do not fit are lost, and LSR tells of it."""
        if self.fcr & FCR_FE:
            for byte in data:
                if self.recv.is_full:
                    self.lsr |= LSR_OE
                else:
                    self.recv.push(byte)
            self.lsr |= LSR_DR
            self.arm_timeout(self._now_ns() + 4 * self._character_ns())
        elif data:
            if self.lsr & LSR_DR:
                self.lsr |= LSR_OE
            self.rbr = data[-1]
            self.lsr |= LSR_DR

    def transmit(self) -> None:
        """Send what is in TSR, or next, as far as `write` takes it."""
        while True:
            if not self.tsr_retry:
                if not self.fcr & FCR_FE:
                    self.tsr = self.thr
                elif self.xmit.count:
                    self.tsr = self.xmit.pop()
                else:  # only a peer's odd state leads here: nothing to send after all
                    self.lsr |= LSR_THRE | LSR_TEMT
                    return
                if not (self.fcr & FCR_FE and self.xmit.count):
                    self.lsr |= LSR_THRE
                    self.thr_ipending = True
            if self.mcr & MCR_LOOP:
                self.receive(bytes((self.tsr,)))
            elif not self._write(bytes((self.tsr,))):
                self.tsr_retry = 1  # stock counts to 4 and gives up; 1 says "waiting" to both
                return
            self.tsr_retry = 0
            if self.lsr & LSR_THRE:
                self.lsr |= LSR_TEMT
                return

    # ---- the registers ----

    def write_register(self, offset: int, value: int) -> None:
        """OUT to one of the eight."""
        self._WRITE[offset](self, value)
        self.update_irq()

    def read_register(self, offset: int) -> int:
        """IN from one of the eight."""
        self.run_timeout()
        value = self._READ[offset](self)
        self.update_irq()
        return value

    def _write_thr(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divider = self.divider & 0xFF00 | value
            return
        self.thr = value
        if self.fcr & FCR_FE:
            if self.xmit.is_full:
                self.xmit.pop()  # the guest did not look at THRE: the oldest byte goes, as in QEMU
            self.xmit.push(value)
        self.thr_ipending = False
        self.lsr &= ~(LSR_THRE | LSR_TEMT)
        if not self.tsr_retry:
            self.transmit()

    def _write_ier(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divider = self.divider & 0x00FF | value << 8
            return
        changed = (self.ier ^ value) & 0x0F
        self.ier = value & 0x0F
        if changed & IER_THRI:
            # Turning THRI on while THRE is set raises it.
            self.thr_ipending = bool(self.ier & IER_THRI and self.lsr & LSR_THRE)

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_FE:
            value |= FCR_RFR | FCR_XFR
        if value & FCR_RFR:
            self.lsr &= ~(LSR_DR | LSR_BI)
            self.arm_timeout(None)
            self.timeout_ipending = False
            self.recv.clear()
        if value & FCR_XFR:
            self.lsr |= LSR_THRE
            if not self.tsr_retry:
                self.lsr |= LSR_TEMT
            self.thr_ipending = True
            self.xmit.clear()
        self.set_fcr(value & FCR_KEPT)

    def set_fcr(self, value: int) -> None:
        """FCR and what follows from it."""
        self.fcr = value
        self.trigger_level = TRIGGER_LEVELS[value >> 6]
        if value & FCR_FE:
            self.iir |= IIR_FE
        else:
            self.iir &= ~IIR_FE

    def _write_lcr(self, value: int) -> None:
        self.lcr = value

    def _write_mcr(self, value: int) -> None:
        self.mcr = value & 0x1F

    def _write_nothing(self, value: int) -> None:
        return None

    def _write_scr(self, value: int) -> None:
        self.scr = value

    def _read_rbr(self) -> int:
        if self.lcr & LCR_DLAB:
            return self.divider & 0xFF
        if not self.fcr & FCR_FE:
            self.lsr &= ~(LSR_DR | LSR_BI)
            return self.rbr
        value = self.recv.pop() if self.recv.count else 0
        if self.recv.count:
            self.arm_timeout(self._now_ns() + 4 * self._character_ns())
        else:
            self.lsr &= ~(LSR_DR | LSR_BI)
            self.arm_timeout(None)
        self.timeout_ipending = False
        return value

    def _read_ier(self) -> int:
        return self.divider >> 8 if self.lcr & LCR_DLAB else self.ier

    def _read_iir(self) -> int:
        value = self.iir
        if value & IIR_ID == IIR_THRI:
            self.thr_ipending = False
        return value

    def _read_lsr(self) -> int:
        value = self.lsr
        self.lsr &= ~(LSR_BI | LSR_OE)
        return value

    def _read_msr(self) -> int:
        if self.mcr & MCR_LOOP:  # the outputs are the inputs
            return (self.mcr & 0x0C) << 4 | (self.mcr & 0x02) << 3 | (self.mcr & 0x01) << 5
        value = self.msr
        self.msr &= ~MSR_ANY_DELTA
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
        lambda self: self.lcr,
        lambda self: self.mcr,
        _read_lsr,
        _read_msr,
        lambda self: self.scr,
    )

    # ---- interrupts and the receive timeout ----

    def update_irq(self) -> None:
        """IIR, the interrupt line and the published LSR, from the registers."""
        cause = IIR_NO_INT
        if self.ier & IER_RLSI and self.lsr & LSR_INT_ANY:
            cause = IIR_RLSI
        elif self.ier & IER_RDI and self.timeout_ipending:
            cause = IIR_CTI
        elif self.ier & IER_RDI and self._is_triggered():
            cause = IIR_RDI
        elif self.ier & IER_THRI and self.thr_ipending:
            cause = IIR_THRI
        elif self.ier & IER_MSI and self.msr & MSR_ANY_DELTA:
            cause = IIR_MSI
        self.iir = self.iir & 0xF0 | cause
        irq = cause != IIR_NO_INT
        if irq != self.irq:
            self.irq = irq
            self._set_irq(irq)
        plain = None if self.lsr & (LSR_BI | LSR_OE) else self.lsr
        if plain != self._published:
            self._published = plain
            self._publish_lsr(plain)

    def _is_triggered(self) -> bool:
        if not self.lsr & LSR_DR:
            return False
        return not self.fcr & FCR_FE or self.recv.count >= self.trigger_level

    def arm_timeout(self, at_ns: int | None) -> None:
        """Have bytes below the trigger level told of at an instant of guest time in ns, or not."""
        self.timeout_at_ns: int | None = at_ns
        self._set_timer(at_ns)

    def run_timeout(self) -> None:
        """The time may be over after which bytes below the trigger level are told of, too."""
        if self.timeout_at_ns is not None and self._now_ns() >= self.timeout_at_ns:
            self.arm_timeout(None)
            if self.recv.count:
                self.timeout_ipending = True
                self.update_irq()

    def _character_ns(self) -> int:
        bits = 1 + 5 + (self.lcr & 3) + (1 if self.lcr & 8 else 0) + (2 if self.lcr & 4 else 1)
        divider = self.divider if 0 < self.divider <= BAUD_BASE else RESET_DIVIDER
        return 1_000_000_000 * divider // BAUD_BASE * bits
