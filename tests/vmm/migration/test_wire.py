"""The numbers of the wire, where a second source can be asked."""

from __future__ import annotations

import struct

from vmm.migration import peer, wire


def test_magics_read_as_the_words_they_are() -> None:
    assert wire.MAGIC.to_bytes(4, "big") == b"QEVM"
    assert peer.HELLO_MAGIC.to_bytes(4, "big") == b"PFRY"
    assert peer.ANSWER_MAGIC.to_bytes(4, "big") == b"PFRY"[::-1]


def test_flags_fit_below_the_page_offset_and_do_not_overlap() -> None:
    assert sum(wire.RamFlag) <= wire.RAM_FLAG_MASK
    assert sum(wire.RamFlag) == wire.RamFlag(0xBFF)


def test_every_layout_is_big_endian_and_unpadded() -> None:
    for name, layout in vars(wire).items():
        if isinstance(layout, struct.Struct):
            assert layout.format.startswith(">"), name


def test_the_pings_are_all_different() -> None:
    values = [value for name, value in vars(wire).items() if name.startswith("PING_")]
    assert len(set(values)) == len(values)
