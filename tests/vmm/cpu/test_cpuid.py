"""The CPU model: its option text, and its answers against stock QEMU's, leaf by leaf."""

from __future__ import annotations

import pathlib
import struct
import subprocess
from typing import Any

import pytest

from tests.support.assemble import assemble
from tests.support.requires import requires
from vmm.cpu.cpuid import APIC, FEATURES, CpuModel, Word
from vmm.cpu.engine import Engine, ExitReason
from vmm.errors import OptionError

RANGES = [
    (0, 0x20, 8),
    (0xD, 0xD, 64),
    (0x40000000, 0x40000002, 2),
    (0x80000000, 0x80000020, 2),
    (0xC0000000, 0xC0000004, 2),
    (0x12345678, 0x12345678, 2),
    (0xB, 0xB, 300),
]
"""First leaf, last leaf, subleaves."""

EMIT = "\n".join(["outb %al, %dx", "shrl $8, %eax"] * 3 + ["outb %al, %dx"])

DUMPER = f"""
    movw $0x3f8, %dx
    movw $ranges, %si
next_range:
    movl %cs:(%si), %ebp
    cmpl $0xffffffff, %ebp
    je done
leaf:
    movw $0, %di
subleaf:
    movl %ebp, %eax
    movzwl %di, %ecx
    cpuid
    movl %edx, %esp
    movw $0x3f8, %dx
    {EMIT}
    movl %ebx, %eax
    {EMIT}
    movl %ecx, %eax
    {EMIT}
    movl %esp, %eax
    {EMIT}
    incw %di
    cmpw %cs:8(%si), %di
    jb subleaf
    incl %ebp
    cmpl %cs:4(%si), %ebp
    jbe leaf
    addw $10, %si
    jmp next_range
done:
    movw $0xf4, %dx
    xorl %eax, %eax
    outl %eax, %dx
1:  hlt
    jmp 1b
ranges:
    {"".join(f".long {a:#x}, {b:#x}; .word {n};" for a, b, n in RANGES)}
    .long 0xffffffff
    .org 0xfff0
    .byte 0xe9
    .word _start - (. + 2)
    .org 0x10000
"""
"""Firmware: 64 KiB below 4 GiB, started at the reset vector in real mode; dumps CPUID to COM1."""

Answers = dict[tuple[int, int], tuple[Any, ...]]


def parse(dump: bytes) -> Answers:
    keys = [(leaf, sub) for a, b, n in RANGES for leaf in range(a, b + 1) for sub in range(n)]
    assert len(dump) == 16 * len(keys)
    return {key: struct.unpack_from("<4I", dump, 16 * i) for i, key in enumerate(keys)}


def ask_stock(text: str, tmp_path: pathlib.Path) -> Answers:
    rom, serial = tmp_path / "rom", tmp_path / "serial"
    rom.write_bytes(assemble(DUMPER, 0, 16))
    machine = "microvm,acpi=off,pit=off,pic=off,rtc=off,x-option-roms=off"
    command = [
        "qemu-system-x86_64",
        "-M",
        machine,
        "-accel",
        "tcg",
        "-cpu",
        text,
        "-m",
        "16",
        "-bios",
        str(rom),
    ]
    command += ["-display", "none", "-nodefaults", "-serial", f"file:{serial}"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return parse(serial.read_bytes())


def ask_engine(text: str) -> Answers:
    import ctypes
    import mmap

    rom = mmap.mmap(-1, 0x10000)
    rom[:] = assemble(DUMPER, 0, 16)
    buffer = (ctypes.c_char * len(rom)).from_buffer(rom)
    engine = Engine(CpuModel.parse(text))
    engine.map_ram(0xFFFF0000, ctypes.addressof(buffer), len(rom))
    dump = bytearray()

    def write(port: int, size: int, value: int) -> None:
        if port == 0x3F8:
            dump.append(value)
        else:
            engine.latch()

    engine.set_port_handlers(lambda port, size: 0, write)
    engine.clear_stop()
    assert engine.run().reason is ExitReason.LATCHED
    engine.close()
    return parse(bytes(dump))


@pytest.mark.parametrize(
    "text",
    [
        "qemu64,-apic,apic-id=0",
        "qemu64",
        "qemu64,-svm,+popcnt,sse4.1=on,lm=off,-apic,apic-id=0",
    ],
)
def test_every_leaf_but_for_the_apic_equals_stock(text: str, tmp_path: pathlib.Path) -> None:
    requires("qemu")
    stock, ours = ask_stock(text, tmp_path), ask_engine(text)
    for key, (*others, edx) in stock.items():
        if key[0] in (0x1, 0x80000001):
            stock[key] = (*others, edx & ~APIC)
    assert {k: v for k, v in ours.items() if v != stock[k]} == {}


@pytest.mark.parametrize("text", ["qemu64", "qemu64,+apic"])
def test_the_guest_is_told_of_no_apic(text: str) -> None:
    answers = ask_engine(text)
    assert not (answers[0x1, 0][3] | answers[0x80000001, 0][3]) & APIC
    assert CpuModel.parse(text).has_apic, "a stock peer's CPU has one"


def test_the_apic_id_is_in_leaf_1_and_0xb() -> None:
    answers = ask_engine("qemu64,apic-id=0x21")
    assert answers[1, 0][1] >> 24 == 0x21
    assert answers[0xB, 0][3] == answers[0xB, 7][3] == 0x21


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_each_feature_can_be_switched_three_ways(name: str) -> None:
    word, bit = FEATURES[name]
    for off in (f"-{name}", f"{name}=off"):
        for on in (f"+{name}", f"{name}=on"):
            assert CpuModel.parse(f"qemu64,{on},{off}").words[word.value] >> bit & 1 == 0
            assert CpuModel.parse(f"qemu64,{off},{on}").words[word.value] >> bit & 1 == 1


def test_aliases_and_underscores() -> None:
    assert CpuModel.parse("qemu64,-sse3,-lahf_lm") == CpuModel.parse("qemu64,-pni,lahf-lm=off")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host", "there is: qemu64"),
        ("", "there is: qemu64"),
        ("qemu64,+avx2", "popcnt"),
        ("qemu64,svm", "expected \\+feature"),
        ("qemu64,", "expected \\+feature"),
        ("qemu64,svm=maybe", "expects 'on' or 'off'"),
        ("qemu64,apic-id=x", "from 0 to 254"),
        ("qemu64,apic-id=255", "from 0 to 254"),
    ],
)
def test_a_wrong_text_says_what_is_accepted(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        CpuModel.parse(text)


def test_words_are_in_the_order_of_the_engine() -> None:
    assert [word.value for word in Word] == list(range(5))
