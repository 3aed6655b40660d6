"""Constants of the x87 in the four rounding modes, as a CPU has them."""

from __future__ import annotations

import pytest

from tests.vmm.cpu.conftest import Box

NEAREST, DOWN, UP, TOWARDS_ZERO = range(4)

# Significands of the nearest value, and of those rounded down and up: the value lies between these two.
CONSTANTS = {
    "fldl2t": (0x4000, 0xD49A784BCD1B8AFE, 0xD49A784BCD1B8AFE, 0xD49A784BCD1B8AFF),
    "fldl2e": (0x3FFF, 0xB8AA3B295C17F0BC, 0xB8AA3B295C17F0BB, 0xB8AA3B295C17F0BC),
    "fldpi": (0x4000, 0xC90FDAA22168C235, 0xC90FDAA22168C234, 0xC90FDAA22168C235),
    "fldlg2": (0x3FFD, 0x9A209A84FBCFF799, 0x9A209A84FBCFF798, 0x9A209A84FBCFF799),
    "fldln2": (0x3FFE, 0xB17217F7D1CF79AC, 0xB17217F7D1CF79AB, 0xB17217F7D1CF79AC),
    "fld1": (0x3FFF, 1 << 63, 1 << 63, 1 << 63),
}


@pytest.mark.parametrize("mode", [NEAREST, DOWN, UP, TOWARDS_ZERO])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_rounded_as_the_control_word_says(box: Box, name: str, mode: int) -> None:
    exponent, nearest, down, up = CONSTANTS[name]
    control = 0x37F | mode << 10
    box.load(f"fninit; pushw ${control}; fldcw (%esp); {name}; fstpt 0x6000; outb %al, $0xf4; jmp _start", 32)
    box.run_to_latch()
    expected = {NEAREST: nearest, DOWN: down, UP: up, TOWARDS_ZERO: down}[mode]
    assert (hex(box.u64(0x6000)), hex(box.u32(0x6008) & 0xFFFF)) == (hex(expected), hex(exponent))
