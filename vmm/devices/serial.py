"""The serial port: a UART between the guest, which has the vCPU's thread, and a backend, which has any other.

    guest --write_port--> [ UART ] --> what is held --> backend        backend --receive--> [ UART ] --> guest

When the backend is full the UART keeps its bytes; `backend_writable` goes on from there.

A guest that prints does so without Python (vmm/cpu/uart.c): while nothing is in the way, the vCPU's thread
has the registers for output and a buffer. Whoever takes the lock here takes them back first, and gives on
what is in the buffer; a timer does so every millisecond while there is output.

Rules:
1. One lock guards the UART: the guest's accesses come on the vCPU's thread, bytes and room on others.
2. No call here waits. The backend's methods neither wait nor call back while they run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vmm.devices import serial_state
from vmm.devices.char_sink import CharSink, NullSink
from vmm.devices.held_output import HeldOutput
from vmm.devices.serial_registers import (
    IER_THRI,
    IIR_NO_INT,
    IIR_THRI,
    LCR_DLAB,
    LSR_TEMT,
    LSR_THRE,
    MCR_LOOP,
    MSR_ANY_DELTA,
)
from vmm.devices.serial_uart import Uart
from vmm.errors import VMStateError
from vmm.vmstate import Values

__all__ = ["FastPath", "Serial"]

OUTPUT_NS = 1_000_000
"""How long a byte may stay in the buffer."""
RBR = THR = 0


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
    """One port. The bus calls `write_port` and `read_port`, the backend `receive` and `backend_writable`."""

    idstr = "serial"
    instance_id = 0
    description = serial_state.SERIAL_DESCRIPTION

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
        self._set_output_timer = set_output_timer
        self._fast = fast
        self._given = False
        self._lock = _Registers(self._take, self._give)  # protects everything below
        self._uart = Uart(now_ns, self._output.write_nowait, publish_lsr, set_irq, set_timer)
        self._has_sent = False  # by itself, since it had the registers last
        self._expect_output(False)

    @property
    def sink(self) -> CharSink:
        """Where the output goes."""
        return self._output.sink

    @sink.setter
    def sink(self, sink: CharSink) -> None:
        self._output.sink = sink

    def reset(self) -> None:
        """As after power-on. What waited for the backend is gone."""
        with self._lock:
            self._clear()
            self._uart.update_irq()
        self.sink.accept_input()

    # ---- the backend's side: any thread ----

    def can_receive(self) -> int:
        """How many bytes `receive` takes without an overrun."""
        with self._lock:
            return self._uart.room

    def receive(self, data: bytes) -> None:
        """Bytes from outside; those that do not fit are lost, and the guest is told (overrun)."""
        with self._lock:
            if not self._uart.mcr & MCR_LOOP:
                self._uart.receive(data)
                self._uart.update_irq()

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
            if self._output.flush() and self._uart.tsr_retry:
                self._uart.transmit()
                self._uart.update_irq()

    def flush_output(self) -> None:
        """Give on what the guest has sent by itself; once more soon if there was something. Any thread."""
        with self._lock:
            if self._expects_output:
                self._expect_output(self._has_sent)

    def receive_timeout(self) -> None:
        """The time may be over after which bytes below the trigger level are told of, too."""
        with self._lock:
            self._uart.run_timeout()

    @property
    def is_idle(self) -> bool:
        """No byte of the guest waits for the backend."""
        with self._lock:
            return bool(self._uart.lsr & LSR_TEMT)

    # ---- the guest's side: the vCPU's thread ----

    def write_port(self, offset: int, size: int, value: int) -> None:
        """OUT to one of the eight registers."""
        with self._lock:
            self._uart.write_register(offset, value)
            is_output = offset == THR and not self._uart.lcr & LCR_DLAB
            if is_output and self._fast is not None and not self._expects_output:
                self._expect_output(True)

    def read_port(self, offset: int) -> int:
        """IN from one of the eight registers."""
        with self._lock:
            value = self._uart.read_register(offset)
        if offset == RBR:
            self.sink.accept_input()
        return value

    # ---- output without Python; under the lock ----

    def _take(self) -> None:
        """Take the registers back from the vCPU, and what it has sent."""
        self._has_sent = False
        if self._fast is None or not self._given:
            return
        taken, uart = self._fast.take_uart(), self._uart
        self._given = False
        uart.ier, uart.thr_ipending = taken.ier, bool(taken.thr_ipending)
        uart.irq = bool(uart.ier & IER_THRI and uart.thr_ipending)
        uart.iir = uart.iir & 0xF0 | (IIR_THRI if uart.irq else IIR_NO_INT)
        if taken.count:
            self._has_sent = True
            uart.thr = uart.tsr = taken.output[taken.count - 1]
            self._output.put(bytes(taken.output[0 : taken.count]))

    def _give(self) -> None:
        """Let the vCPU have the registers, unless they are about more than output."""
        uart = self._uart
        is_redirected = uart.lcr & LCR_DLAB or uart.mcr & MCR_LOOP or uart.msr & MSR_ANY_DELTA
        is_busy = uart.lsr != LSR_THRE | LSR_TEMT or uart.tsr_retry or uart.timeout_ipending
        if self._fast is None or is_redirected or is_busy:
            return
        registers = {
            "is_open": 1,
            "takes_output": int(self._expects_output and self._output.goes_through),
            "ier": uart.ier,
            "thr_ipending": int(uart.thr_ipending),
            "msr": uart.msr,
            "iir_fifo": uart.iir & 0xF0,
        }
        self._fast.give_uart(registers)
        self._given = True

    def _expect_output(self, expected: bool) -> None:
        """The guest prints: look again soon; or it has stopped doing so: the next byte comes to us."""
        self._expects_output = expected
        self._set_output_timer(self._now_ns() + OUTPUT_NS if expected else None)

    def _clear(self) -> None:
        self._uart.clear()
        self._expect_output(False)

    # ---- what travels ----

    def save(self) -> Values:
        """The section's values; see `serial_state`."""
        with self._lock:
            return serial_state.save(self._uart)

    def load(self, values: Values, version: int) -> None:
        """Take a saved state over; VMStateError leaves the UART as after a reset."""
        with self._lock:
            self._clear()
            try:
                serial_state.load(self._uart, values)
            except VMStateError:
                self._clear()
                raise
            finally:
                self._uart.update_irq()
        self.backend_writable()
        self.sink.accept_input()
