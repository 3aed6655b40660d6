"""Device registers in the guest's memory: sizes, addresses, what is around them, and handlers that wait."""

from __future__ import annotations

import threading

import pytest

from tests.vmm.cpu.conftest import Box
from vmm.cpu.engine import ExitReason
from vmm.cpu.errors import CpuError

AT = 0xFEB00000
PAGE = 4096


class Registers:
    """Answers every read with a pattern, notes every access."""

    def __init__(self, box: Box) -> None:
        self.calls: list[tuple[int, ...]] = []
        box.engine.map_mmio(AT, PAGE, self.read, self.write)

    def read(self, address: int, size: int) -> int:
        self.calls.append((address - AT, size))
        return 0x8877665544332211

    def write(self, address: int, size: int, value: int) -> None:
        self.calls.append((address - AT, size, value))


def test_sizes_and_values(box: Box) -> None:
    registers = Registers(box)
    box.load(
        f"movl ${AT:#x}, %edi; movb (%edi), %al; movw 2(%edi), %bx; movl 4(%edi), %ecx; fildll 8(%edi);"
        "movb %al, 0x10(%edi); movw %bx, 0x12(%edi); movl %ecx, 0x14(%edi); fistpll 0xff8(%edi); hlt",
        32,
    )
    assert box.run().reason is ExitReason.HALTED
    assert registers.calls == [  # eight bytes come as two accesses
        (0, 1),
        (2, 2),
        (4, 4),
        (8, 4),
        (12, 4),
        (0x10, 1, 0x11),
        (0x12, 2, 0x2211),
        (0x14, 4, 0x44332211),
        (0xFF8, 4, 0x44332211),
        (0xFFC, 4, 0x44332211),
    ]


def test_around_the_registers_is_the_open_bus(box: Box) -> None:
    registers = Registers(box)
    box.load(
        f"movl ${AT - 4:#x}, %edi; movl (%edi), %eax; movl %eax, (%edi); movl {PAGE + 4}(%edi), %ebx; hlt", 32
    )
    assert box.run().reason is ExitReason.HALTED
    assert (box.regs()[0], box.regs()[3], registers.calls) == (0xFFFFFFFF, 0xFFFFFFFF, [])


def test_after_the_latch_no_register_is_touched(box: Box) -> None:
    registers = Registers(box)
    box.load(f"movl ${AT:#x}, %edi; outb %al, $0xf4; movl %eax, (%edi); movl (%edi), %eax; jmp .", 32)
    box.run_to_latch()
    assert registers.calls == []


def test_a_handler_that_raises_ends_the_run(box: Box) -> None:
    def broken(address: int, size: int) -> int:
        raise ValueError("register 0x10")

    box.engine.map_mmio(AT, PAGE, broken, lambda address, size, value: None)
    box.load(f"movl ${AT + 16:#x}, %edi; movl (%edi), %eax; 1: jmp 1b", 32)
    result = box.run()
    assert result.reason is ExitReason.INTERNAL_ERROR
    assert "register 0x10" in result.text


def test_others_work_at_a_safe_point_while_a_handler_waits_for_them(box: Box) -> None:
    """A device's worker drops translated code while the vCPU waits for the worker's lock."""
    done = threading.Event()

    def worker() -> None:
        box.engine.flush(timeout_s=20)
        done.set()

    def read(address: int, size: int) -> int:
        threading.Thread(target=worker).start()
        return int(done.wait(10))

    box.engine.map_mmio(AT, PAGE, read, lambda address, size, value: None)
    box.load(f"movl ${AT:#x}, %edi; movl (%edi), %eax; hlt", 32)
    assert box.run().reason is ExitReason.HALTED
    assert box.regs()[0] == 1


@pytest.mark.parametrize(
    ("address", "length"), [(0, PAGE), (AT + 1, PAGE), (AT, 1), (AT, 0), (AT, PAGE), (1 << 40, PAGE)]
)
def test_ranges_that_cannot_be(box: Box, address: int, length: int) -> None:
    Registers(box)
    with pytest.raises(CpuError, match="Cannot map"):
        box.engine.map_mmio(address, length, lambda *_: 0, lambda *_: None)
