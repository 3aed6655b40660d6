"""The UART: registers and FIFOs against the data sheet, back-pressure, and what travels."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmm.devices.serial import Serial
from vmm.devices.serial_state import RECV_FIFO, SERIAL_DESCRIPTION, THR_IPENDING, TSR, XMIT_FIFO
from vmm.errors import StreamTruncated, VMStateError
from vmm.vmstate import BytesSource, Values, decode, encode

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7


class Room:
    """A backend with as much room as it is told."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.out = bytearray()
        self.accepted = 0

    def write_nowait(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.out += taken
        return len(taken)

    def accept_input(self) -> None:
        self.accepted += 1

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return True


class Bench:
    """A UART with its surroundings."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.sink = Room(room)
        self.now = 0
        self.lsr: int | None = None
        self.irq = False
        self.uart = Serial(self.sink, lambda: self.now, self._publish, self._set_irq)

    def _publish(self, value: int | None) -> None:
        self.lsr = value

    def _set_irq(self, level: bool) -> None:
        self.irq = level

    def out(self, register: int, value: int) -> None:
        self.uart.write_port(register, 1, value)

    def read(self, register: int) -> int:
        return self.uart.read_port(register)

    def state(self) -> Values:
        state: Values = self.uart.save()["state"]
        return state

    def wire(self) -> bytes:
        return encode(SERIAL_DESCRIPTION, self.uart.save())

    def moved(self) -> Bench:
        """Another UART that got this one's state over the wire, with all the room there is."""
        other = Bench()
        other.now = self.now
        other.uart.load(decode(SERIAL_DESCRIPTION, BytesSource(self.wire()), 3), 3)
        return other


def test_after_a_reset_it_is_what_stock_sends() -> None:
    # Recorded from QEMU 7.2: microvm, isa-serial=on, -serial null, nothing run.
    assert Bench().wire() == bytes.fromhex("000c 00 00 01 00 08 60 b0 00 00")


def test_a_byte_goes_out_at_once() -> None:
    bench = Bench()
    bench.out(THR, 0x41)
    assert bench.sink.out == b"A"
    assert bench.read(LSR) == 0x60
    assert bench.lsr == 0x60


def test_divisor_latch() -> None:
    bench = Bench()
    bench.out(LCR, 0x83)
    bench.out(DLL, 0x34)
    bench.out(DLM, 0x12)
    assert (bench.read(DLL), bench.read(DLM)) == (0x34, 0x12)
    bench.out(LCR, 0x03)
    assert bench.read(IER) == 0
    assert bench.state()["divider"] == 0x1234
    assert bench.sink.out == b""


@pytest.mark.parametrize(
    ("register", "value", "back"), [(LCR, 0x1B, 0x1B), (MCR, 0xFF, 0x1F), (SCR, 0x5A, 0x5A)]
)
def test_plain_registers(register: int, value: int, back: int) -> None:
    bench = Bench()
    bench.out(register, value)
    assert bench.read(register) == back


def test_loopback() -> None:
    bench = Bench()
    bench.out(MCR, 0x10)
    bench.out(THR, 0x55)
    assert bench.read(LSR) & 1
    assert bench.read(RBR) == 0x55
    assert bench.sink.out == b""
    bench.uart.receive(b"x")  # from outside nothing comes in
    assert not bench.read(LSR) & 1
    bench.out(MCR, 0x1F)
    assert bench.read(MSR) == 0xF0


def test_overrun_without_a_fifo() -> None:
    bench = Bench()
    assert bench.uart.can_receive() == 1
    bench.uart.receive(b"a")
    assert bench.uart.can_receive() == 0
    bench.uart.receive(b"b")
    assert bench.lsr is None  # reading LSR has an effect now
    assert bench.read(LSR) == 0x63
    assert bench.read(LSR) == 0x61
    assert bench.read(RBR) == ord("b")
    assert bench.sink.accepted


def test_receive_fifo_trigger_and_timeout() -> None:
    bench = Bench()
    bench.out(FCR, 0x81)  # trigger at 8
    bench.out(IER, 0x01)
    assert bench.uart.can_receive() == 8
    bench.uart.receive(b"1234567")
    assert not bench.irq
    assert bench.uart.can_receive() == 1
    bench.uart.receive(b"8")
    assert bench.irq
    assert bench.read(IIR) == 0xC4
    assert bench.read(RBR) == ord("1")
    assert bench.read(IIR) == 0xC1
    bench.now += 10**9
    assert bench.read(SCR) == 0
    assert bench.read(IIR) == 0xCC  # seven bytes are waiting since long
    assert bytes(bench.read(RBR) for _ in range(7)) == b"2345678"
    assert bench.read(IIR) == 0xC1
    assert bench.read(RBR) == 0
    bench.uart.receive(b"x" * 17)
    assert bench.read(LSR) & 2


def test_thr_interrupt() -> None:
    bench = Bench()
    bench.out(IER, 0x02)
    assert bench.irq
    assert bench.read(IIR) == 0x02
    assert not bench.irq
    assert bench.read(IIR) == 0x01
    bench.out(THR, 0x41)
    assert bench.irq


def test_line_status_interrupt_goes_first() -> None:
    bench = Bench()
    bench.out(IER, 0x07)
    bench.uart.receive(b"a")
    bench.uart.receive(b"b")
    assert bench.read(IIR) == 0x06
    bench.read(LSR)
    assert bench.read(IIR) == 0x04


def test_fcr_clears_the_fifos() -> None:
    bench = Bench(room=0)
    bench.out(FCR, 0x01)
    bench.out(THR, 1)
    bench.out(THR, 2)
    bench.uart.receive(b"abc")
    bench.out(FCR, 0x07)
    assert bench.read(LSR) == 0x20  # one byte is in TSR still
    bench.sink.room = 9
    bench.uart.backend_writable()
    assert bench.sink.out == b"\x01"
    assert bench.read(LSR) == 0x60


@pytest.mark.parametrize("fifo", [False, True])
def test_a_full_backend_makes_thr_busy(fifo: bool) -> None:
    bench = Bench(room=1)
    bench.out(FCR, int(fifo))
    sent = bytearray()
    for byte in range(40):
        if not bench.read(LSR) & 0x20:
            break
        bench.out(THR, byte)
        sent.append(byte)
    assert len(sent) == 3  # one went out, one is in TSR, one in THR or the FIFO
    assert not bench.uart.is_idle
    bench.sink.room = 100
    bench.uart.backend_writable()
    assert bench.sink.out == sent
    assert bench.uart.is_idle


def test_what_waits_travels() -> None:
    bench = Bench(room=0)
    bench.out(FCR, 0xC1)
    for byte in b"hello":
        bench.out(THR, byte)
    bench.uart.receive(b"in")
    state = bench.state()
    assert {TSR, RECV_FIFO, XMIT_FIFO} <= set(state)
    other = bench.moved()
    assert other.sink.out == b"hello"
    assert bytes((other.read(RBR), other.read(RBR))) == b"in"
    assert bench.sink.out == b""


def test_thr_ipending_travels_when_iir_does_not_tell() -> None:
    bench = Bench()
    bench.out(IER, 0x03)
    bench.uart.receive(b"x")  # IIR shows RDI, THRI is pending behind it
    assert bench.state()[THR_IPENDING] == {"thr_ipending": 1}
    other = bench.moved()
    assert other.read(IIR) == 0x04
    other.read(RBR)
    assert other.read(IIR) == 0x02


def bad(**changes: Any) -> Values:
    bench = Bench(room=0)
    bench.out(FCR, 1)
    bench.out(THR, 1)
    bench.out(THR, 2)
    state = bench.state()
    for name, value in changes.items():
        state[name] = value
    return {"state": state}


@pytest.mark.parametrize(
    "values",
    [
        bad(lsr=0x60),
        {"state": {**Bench().state(), "lsr": 0}},
        {"state": {**bad()["state"], XMIT_FIFO: {"xmit_fifo": {"data": bytes(16), "head": 16, "num": 1}}}},
        {"state": {**bad()["state"], XMIT_FIFO: {"xmit_fifo": {"data": bytes(16), "head": 0, "num": 17}}}},
    ],
)
def test_an_impossible_state_is_refused_and_leaves_a_reset_uart(values: Values) -> None:
    bench = Bench()
    bench.out(SCR, 9)
    with pytest.raises(VMStateError):
        bench.uart.load(values, 3)
    assert bench.wire() == Bench().wire()


def test_version_2_has_no_fcr() -> None:
    state = Bench().state()
    del state["fcr_vmstate"]
    bench = Bench()
    bench.uart.load({"state": state}, 2)
    assert bench.read(IIR) == 0x01


@given(st.binary(max_size=120))
def test_no_bytes_do_harm(data: bytes) -> None:
    bench = Bench()
    with contextlib.suppress(VMStateError, StreamTruncated):
        bench.uart.load(decode(SERIAL_DESCRIPTION, BytesSource(data.ljust(11, b"\0")), 3), 3)
    for register in range(8):
        bench.out(register, 0x41)
        bench.read(register)


class PoliteGuest(RuleBasedStateMachine):
    """A guest that writes only when THRE is set; a backend with changing room; hops at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(room=3)
        self.sent = bytearray()
        self.out = bytearray()

    @rule(byte=st.integers(0, 255))
    def send(self, byte: int) -> None:
        if self.bench.read(LSR) & 0x20:
            self.bench.out(THR, byte)
            self.sent.append(byte)

    @rule(room=st.integers(0, 20))
    def make_room(self, room: int) -> None:
        self.bench.sink.room = room
        self.bench.uart.backend_writable()

    @rule(ier=st.integers(0, 15))
    def choose_interrupts(self, ier: int) -> None:
        self.bench.out(IER, ier)
        self.bench.read(IIR)

    @rule(data=st.binary(max_size=20))
    def receive(self, data: bytes) -> None:
        self.bench.uart.receive(data)

    @rule(fcr=st.sampled_from([0x01, 0xC1]))
    def use_the_fifo(self, fcr: int) -> None:
        if self.bench.uart.is_idle:
            self.bench.out(FCR, fcr)

    @rule()
    def hop(self) -> None:
        self.out += self.bench.sink.out
        other = self.bench.moved()
        assert other.uart.save()["state"]["ier"] == self.bench.state()["ier"]
        self.bench = other
        other.sink.room = 2

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        out = bytes(self.out + self.bench.sink.out)
        assert self.sent.startswith(out)
        if self.bench.uart.is_idle:
            assert self.sent == out

    @invariant()
    def the_published_lsr_is_the_register(self) -> None:
        if self.bench.lsr is not None:
            assert self.bench.lsr == self.bench.state()["lsr"]


TestPoliteGuest = PoliteGuest.TestCase


def test_bytes_below_the_trigger_level_are_told_of_when_the_line_has_been_quiet() -> None:
    at: list[int | None] = []
    told: list[bool] = []
    now = 0
    uart = Serial(Room(), lambda: now, set_irq=told.append, set_timer=at.append)
    uart.write_port(FCR, 1, 0xC1)  # FIFO on, 14 bytes
    uart.write_port(LCR, 1, 0x03)
    uart.write_port(IER, 1, 0x01)
    uart.receive(b"abc")
    assert told == []
    instant = at[-1]
    assert instant is not None
    assert instant == pytest.approx(4 * 10 * 1e9 * 12 / 115200, rel=0.01), "four characters of ten bits"
    now = instant - 1
    uart.receive_timeout()
    assert told == []
    now = instant
    uart.receive_timeout()
    assert told == [True]
    assert uart.read_port(IIR) & 0x0F == 0x0C
    assert bytes(uart.read_port(RBR) for _ in range(3)) == b"abc"
    assert told == [True, False]
    assert at[-1] is None
