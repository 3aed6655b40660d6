"""A UART whose registers for output the vCPU's thread has (uart.c), and its Python twin that has all itself:
any guest sees, says and leaves behind the same on both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmm.cpu._engine import ffi, lib
from vmm.devices.serial import Serial


class Sink:
    """Takes so many bytes, and no more until it is given room."""

    def __init__(self) -> None:
        self.room = 1 << 20
        self.said = b""

    def write_nowait(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.said += taken
        return len(taken)

    def accept_input(self) -> None: ...

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return True


class Registers:
    """As the engine has them."""

    def __init__(self) -> None:
        self.uart = ffi.new("struct pf_uart *")

    def take_uart(self) -> Any:
        taken = ffi.new("struct pf_uart *", self.uart[0])
        self.uart.is_open = self.uart.count = 0
        return taken

    def give_uart(self, registers: Mapping[str, int]) -> None:
        self.uart[0] = ffi.new("struct pf_uart *", registers)[0]


class Bench:
    def __init__(self, *, is_fast: bool) -> None:
        self.sink = Sink()
        self.registers = Registers()
        self.line = False
        self.at_ns: int | None = None
        self.serial = Serial(
            self.sink,
            set_irq=self._set_irq,
            set_output_timer=self._set_timer,
            fast=self.registers if is_fast else None,
        )
        self.by_c = 0
        self.serial.flush_output()  # the guest has the registers from here on

    def _set_irq(self, level: bool) -> None:
        self.line = level

    def _set_timer(self, at_ns: int | None) -> None:
        self.at_ns = at_ns

    def write(self, offset: int, value: int) -> None:
        if lib.pf_uart_write(self.registers.uart, offset, value):
            self._follow()
        else:
            self.serial.write_port(offset, 1, value)

    def read(self, offset: int) -> int:
        value = int(lib.pf_uart_read(self.registers.uart, offset))
        if value < 0:
            return self.serial.read_port(offset)
        self._follow()
        return value

    def _follow(self) -> None:
        self.by_c += 1
        self.line = bool(lib.pf_uart_output(self.registers.uart))


HOT = ["w0", "w1", "r2", "r6"]
REGISTERS = [f"{way}{offset}" for way in "rw" for offset in range(8)]
OUTPUT = st.tuples(st.sampled_from(HOT), st.sampled_from([0x00, 0x02, 0x05, 0x07, 0x41]))
ANY = st.one_of(
    st.tuples(st.sampled_from(REGISTERS), st.integers(0, 255)),
    st.tuples(st.sampled_from(["receive", "flush", "hold", "release"]), st.just(0)),
)


def act(bench: Bench, action: str, value: int) -> int | None:
    match action:
        case "receive":
            bench.serial.receive(b"x")
        case "flush":
            bench.serial.flush_output()
        case "hold":
            bench.serial.hold_output()
        case "release":
            bench.serial.release_output()
        case _ if action[0] == "r":
            return bench.read(int(action[1]))
        case _:
            bench.write(int(action[1]), value)
    return None


@given(st.lists(st.one_of(OUTPUT, OUTPUT, ANY), max_size=60))
def test_both_are_equal(actions: list[tuple[str, int]]) -> None:
    fast, twin = Bench(is_fast=True), Bench(is_fast=False)
    for action, value in actions:
        assert act(fast, action, value) == act(twin, action, value), action
        assert fast.line == twin.line, action
    assert fast.serial.save() == twin.serial.save()
    assert fast.sink.said == twin.sink.said, "whoever saves has given on what was sent"


def printing(bench: Bench, text: bytes) -> None:
    for byte in text:
        bench.write(0, byte)


def test_what_is_printed_needs_no_python_and_comes_out_whole() -> None:
    bench = Bench(is_fast=True)
    text = bytes(range(256)) * 10
    printing(bench, text)
    assert bench.by_c > len(text) - 10
    assert bench.at_ns is not None
    bench.serial.flush_output()
    assert bench.sink.said == text
    assert bench.at_ns is not None, "there was output: once more"
    bench.serial.flush_output()
    assert bench.at_ns is None, "none was there: the next byte goes through at once"


def test_a_full_sink_holds_the_guest_and_loses_nothing() -> None:
    bench = Bench(is_fast=True)
    text = bytes(range(256)) * 4
    printing(bench, text[:1])
    bench.sink.room = 100
    printing(bench, text[1:500])
    bench.serial.flush_output()
    assert bench.sink.said == text[:101]
    printing(bench, text[500:501])
    assert not bench.read(5) & 0x40, "the transmitter is busy"
    bench.sink.room = 1 << 20
    bench.serial.backend_writable()
    assert bench.read(5) & 0x40
    assert bench.sink.said == text[:501]
