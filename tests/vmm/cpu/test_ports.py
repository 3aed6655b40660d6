"""Port I/O: sizes, the latch, the fast path, and handlers that raise."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vmm.cpu.conftest import Box
from vmm.cpu.engine import Engine, ExitReason
from vmm.cpu.errors import CpuError


def test_sizes_and_values(box: Box) -> None:
    calls: list[tuple[int, ...]] = []

    def read(port: int, size: int) -> int:
        calls.append((port, size))
        return 0xCAFEBABE11223344

    box.engine.set_port_handlers(read, lambda port, size, value: calls.append((port, size, value)))
    box.load(
        "movl $0xffffffff, %eax; movw $0x1234, %dx; inb %dx, %al; outl %eax, %dx; movl $-1, %eax;"
        "inw %dx, %ax; outl %eax, %dx; inl %dx, %eax; outl %eax, %dx; outw %ax, %dx; outb %al, %dx; hlt",
        32,
    )
    assert box.run().reason is ExitReason.HALTED
    assert calls == [
        (0x1234, 1),
        (0x1234, 4, 0xFFFFFF44),
        (0x1234, 2),
        (0x1234, 4, 0xFFFF3344),
        (0x1234, 4),
        (0x1234, 4, 0x11223344),
        (0x1234, 2, 0x3344),
        (0x1234, 1, 0x44),
    ]


def test_string_output(box: Box) -> None:
    box.put(0x6000, b"Hello, world")
    box.load(
        "movl $0x6000, %esi; movl $12, %ecx; movw $0xe9, %dx; cld; rep outsb; outb %al, $0xf4; jmp .", 32
    )
    box.run_to_latch()
    assert bytes(box.output) == b"Hello, world"


def test_after_the_exit_port_nothing_later_is_output(box: Box) -> None:
    box.load(
        "movb $65, %al; outb %al, $0xe9; movb $7, %al; outb %al, $0xf4; movb $66, %al; outb %al, $0xe9;"
        "inb $0x80, %al; movzbl %al, %ebx; outb %al, $0xf4; outb %al, $0xe9; 1: outb %al, $0xe9; jmp 1b",
        32,
    )
    box.run_to_latch()
    assert bytes(box.output) == b"A"
    assert box.exit_codes == [7]
    assert box.regs()[3] in (0, 0xFF)


def test_the_next_run_has_its_ports_back(box: Box) -> None:
    box.load("1: outb %al, $0xf4; jmp 2f; 2: movb $66, %al; outb %al, $0xe9; jmp 1b", 32)
    for n in range(5):
        box.run_to_latch()
        assert bytes(box.output) == b"B" * n


def test_fast_read(box: Box) -> None:
    box.load("inb $0x60, %al; movb %al, %bl; inw $0x60, %ax; movw %ax, %cx; hlt", 32)
    box.engine.set_fast_read(0x60, 0xA5)
    box.run()
    assert box.regs()[3] == 0xA5
    assert box.regs()[1] == 0x60, "only byte reads"
    box.engine.clear_fast_read(0x60)
    box.load("inb $0x60, %al; hlt", 32)
    box.run()
    assert box.regs()[0] == 0x60


def test_a_port_of_no_device_takes_bytes_without_a_call(box: Box) -> None:
    box.load("outb %al, $0xe9; inb $0xe9, %al; movl %eax, %ebx; outw %ax, $0xe9; hlt", 32)
    box.engine.set_no_device(0xE9)
    box.run()
    assert box.regs()[3] & 0xFF == 0xFF
    assert len(box.output) == 2, "wider accesses reach the bus, which knows the ports beside it"
    with pytest.raises(CpuError):
        box.engine.set_no_device(0x10000)


def test_the_controllers_keep_their_ports(box: Box) -> None:
    box.engine.enable_pics()
    box.engine.set_no_device(0x21)
    box.load("movb $0x5a, %al; outb %al, $0x21; movb $0, %al; inb $0x21, %al; hlt", 32)
    box.run()
    assert box.regs()[0] & 0xFF == 0x5A


@pytest.mark.parametrize(("port", "value"), [(0x10000, 1), (0x60, 256)])
def test_fast_read_out_of_range(box: Box, port: int, value: int) -> None:
    with pytest.raises(CpuError):
        box.engine.set_fast_read(port, value)


def bad_read(port: int, size: int) -> int:
    raise KeyError("the handler's own words")


def bad_write(port: int, size: int, value: int) -> None:
    raise SystemExit("the handler's own words")


@pytest.mark.parametrize("instruction", ["inb $0x60, %al", "outb %al, $0x60"])
def test_a_handler_that_raises_ends_the_run_with_its_traceback(
    box: Box, instruction: str, capfd: pytest.CaptureFixture[str]
) -> None:
    later: list[int] = []
    box.load(f"{instruction}; movl $1, %eax; outl %eax, $0xe9; jmp .", 32)
    box.engine.set_port_handlers(bad_read, bad_write)
    box.engine.clear_stop()
    result = box.engine.run()
    assert result.reason is ExitReason.INTERNAL_ERROR
    assert "the handler's own words" in result.text
    assert "test_ports.py" in result.text
    assert later == []
    assert capfd.readouterr() == ("", "")


def test_a_handler_that_returns_no_number(box: Box) -> None:
    box.load("inb $0x60, %al; jmp .", 32)
    nothing: Any = None
    box.engine.set_port_handlers(lambda port, size: nothing, lambda port, size, value: None)
    box.engine.clear_stop()
    result = box.engine.run()
    assert result.reason is ExitReason.INTERNAL_ERROR
    assert "TypeError" in result.text


def test_without_handlers_ports_are_an_open_bus() -> None:
    box = Box()
    box.engine.close()
    box.engine = Engine()
    box.engine.map_ram(0, box.host_address, len(box.ram))
    box.load("inl $0x60, %eax; outl %eax, $0x60; hlt", 32)
    assert box.run().reason is ExitReason.HALTED
    assert box.regs()[0] == 0xFFFFFFFF
    box.close()


def test_latching_from_outside_is_an_error(box: Box) -> None:
    with pytest.raises(CpuError):
        box.engine.latch()
