"""The interrupt controllers in C are those of the Python model, whatever a guest does to them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cpu import _engine
from vmm.cpu.engine import PIC_REGISTERS
from vmm.devices import pic
from vmm.devices.pic import PicPair

lib: Any = _engine.lib
ffi: Any = _engine.ffi

PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
BYTES = st.one_of(
    st.integers(0, 255), st.sampled_from((0x11, 0x13, 0x20, 0x60, 0xA0, 0xE1, 0x0C, 0x6A, 0x0B))
)
STEP = st.one_of(
    st.tuples(st.just("line"), st.integers(0, 15), st.integers(0, 1)),
    st.tuples(st.just("write"), st.sampled_from(PORTS), BYTES),
    st.tuples(st.just("read"), st.sampled_from(PORTS), st.just(0)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
)
SET_UP = [
    ("write", port, value)
    for base, port in ((0x20, 0x20), (0x28, 0xA0))
    for port, value in ((port, 0x11), (port + 1, base), (port + 1, 4), (port + 1, 1), (port + 1, 0))
]


def act(pair: PicPair, pics: Any, step: tuple[str, int, int]) -> tuple[int, int]:
    """Do it to both; what each gave."""
    kind, where, value = step
    if kind == "line":
        pair.set_line(where, bool(value))
        lib.pf_pics_set_line(pics, where, value)
    elif kind == "write":
        pair.write(where, value)
        lib.pf_pics_write(pics, where, value)
    elif kind == "read":
        return pair.read(where), lib.pf_pics_read(pics, where)
    else:
        return pair.acknowledge(), lib.pf_pics_acknowledge(pics)
    return 0, 0


def registers(pic: Any) -> dict[str, int]:
    return {name: getattr(pic, name) for name in PIC_REGISTERS}


@pytest.mark.parametrize("before", [[], SET_UP], ids=["at power-on", "set up"])
@given(steps=st.lists(STEP, max_size=60))
def test_both_say_the_same(before: list[tuple[str, int, int]], steps: list[tuple[str, int, int]]) -> None:
    pair, pics = PicPair(), ffi.new("struct pf_pics *")
    for step in (*before, *steps):
        ours, theirs = act(pair, pics, step)
        assert ours == theirs, step
        assert pair.output == bool(lib.pf_pics_output(pics)), step
        assert pair.master.registers == registers(pics.pic[0]), step
        assert pair.slave.registers == registers(pics.pic[1]), step


def test_the_names_are_those_of_the_section() -> None:
    assert PIC_REGISTERS == pic.PIC_REGISTERS


def test_priorities_the_cascade_and_the_end_of_an_interrupt() -> None:
    pair = PicPair()
    for _, port, value in SET_UP:
        pair.write(port, value)
    for irq in (12, 4, 0):
        pair.set_line(irq, True)
    assert [pair.acknowledge(), pair.output] == [0x20, False]  # 0 is above the others
    pair.write(0x20, 0x20)
    assert pair.acknowledge() == 0x28 + 4  # the cascade is input 2
    pair.write(0xA0, 0x20)
    pair.write(0x20, 0x20)
    assert pair.acknowledge() == 0x24
    assert not pair.output
