"""Guests that do their worst: QMP answers within 20 ms all the while, and no memory grows."""

from __future__ import annotations

import asyncio
import pathlib
import statistics
import struct
import time

import pytest

from tests.functional.harness import Stable
from tests.support.assemble import assemble

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

ORIGIN = 0x100000
ASKED = 60
INTERVAL_S = 0.01
LATENCY_S = 0.020
GROWTH_BYTES = 6 << 20
TRANSLATED_BYTES = 72 << 20
"""For a guest that makes the engine translate code for ever: the buffer for it is emptied when it is full."""
ENDLESS_CODE = "self-modifying through an alias"

SET_UP_PICS = """
    cli
    lidt idt_pointer
    mov $0x11, %al; out %al, $0x20; out %al, $0xa0
    mov $0x20, %al; out %al, $0x21; mov $0x28, %al; out %al, $0xa1
    mov $4, %al; out %al, $0x21; mov $2, %al; out %al, $0xa1
    mov $1, %al; out %al, $0x21; out %al, $0xa1
    mov $0xfe, %al; out %al, $0x21; mov $0xff, %al; out %al, $0xa1
    mov $handler, %eax
    mov %ax, idt + 0x20 * 8; movw $0x08, idt + 0x20 * 8 + 2
    movw $0x8e00, idt + 0x20 * 8 + 4; shr $16, %eax; mov %ax, idt + 0x20 * 8 + 6
"""
TABLES = """
handler: push %eax; mov $0x20, %al; out %al, $0x20; pop %eax; iret
    .balign 8
idt_pointer: .word 0x21 * 8 - 1; .long idt
    .balign 8
idt: .fill 0x21, 8, 0
"""

GUESTS = {
    "port flood": "xor %eax, %eax; 1: inc %edx; out %al, %dx; in %dx, %al; xor %eax, %eax; jmp 1b",
    "wide port flood": "xor %eax, %eax; 1: add $3, %edx; out %eax, %dx; in %dx, %eax; xor %eax, %eax; jmp 1b",
    "serial flood": "mov $0x3f8, %dx; mov $'x', %al; 1: out %al, %dx; jmp 1b",
    "interrupt storm": SET_UP_PICS + """
        mov $0x34, %al; out %al, $0x43; mov $1, %al; out %al, $0x40; xor %al, %al; out %al, $0x40
        sti
    1:  hlt
        jmp 1b
    """ + TABLES,
    "timer reprogrammed for ever": SET_UP_PICS + """
        sti
    1:  mov $0x30, %al; out %al, $0x43; mov $2, %al; out %al, $0x40; xor %al, %al; out %al, $0x40
        jmp 1b
    """ + TABLES,
    "wild MMIO": """
    1:  imul $1664525, %ebx, %ebx; add $1013904223, %ebx; mov %ebx, %ecx; or $0x40000000, %ecx
        mov (%ecx), %eax; mov %eax, (%ecx); jmp 1b
    """,
    ENDLESS_CODE: """
        mov $0x200000, %edi
        movl $0x201003, (%edi)                          # directory: the first 4 MiB by a table
        movl $0x201003, 0x800(%edi)                     # and again at 0x80000000
        mov $0x201000, %edi; xor %ecx, %ecx
    1:  mov %ecx, %eax; shl $12, %eax; or $3, %eax; mov %eax, (%edi, %ecx, 4)
        inc %ecx; cmp $1024, %ecx; jb 1b
        mov $0x200000, %eax; mov %eax, %cr3; mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0
    2:  incl patched + 1 + 0x80000000
    patched: mov $1, %eax
        jmp 2b
    """,
    "page tables of garbage": """
        mov $0x200000, %edi; mov $0x1000, %ecx
    1:  imul $1664525, %ebx, %ebx; add $1013904223, %ebx; mov %ebx, (%edi); add $4, %edi; loop 1b
        mov $0x200000, %eax; mov %eax, %cr3; mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0
    2:  jmp 2b
    """,
    "triple fault": "lidt nothing; ud2; nothing: .word 0; .long 0",
    "cli and hlt": "cli; hlt",
}  # fmt: skip


def elf(text: str) -> bytes:
    """A 32-bit executable that is one segment at ORIGIN."""
    code = assemble(text, ORIGIN, 32)
    header = struct.pack(
        "<4sBBB9xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 2, 3, 1, ORIGIN, 52, 0, 0, 52, 32, 1, 0, 0, 0
    )
    segment = struct.pack("<IIIIIIII", 1, 84, ORIGIN, ORIGIN, len(code), len(code) + 0x1000, 7, 4096)
    return header + segment + code


@pytest.mark.parametrize("name", GUESTS)
async def test_qmp_answers_and_memory_stays(stable: Stable, tmp_path: pathlib.Path, name: str) -> None:
    image = tmp_path / "guest.elf"
    image.write_bytes(elf(GUESTS[name]))
    machine = await stable.start(
        "hostile", "-M", "microvm", "-m", "32M", "-kernel", str(image), serial="null"
    )
    await machine.wait_run_state("running")
    latencies = []
    grown_from = 0
    asked = ASKED * 4 if name == ENDLESS_CODE else ASKED
    for number in range(asked):
        if number == ASKED // 3:  # by then what is made once is there
            grown_from = machine.resident_bytes()
        began = time.monotonic()
        await machine.qmp("query-status")
        latencies.append(time.monotonic() - began)
        await asyncio.sleep(INTERVAL_S)
    allowed = TRANSLATED_BYTES if name == ENDLESS_CODE else GROWTH_BYTES
    assert machine.resident_bytes() - grown_from < allowed
    assert statistics.median(latencies) < LATENCY_S
    await machine.qmp("stop")
    await machine.qmp("system_reset")
    await machine.wait_event("RESET", lambda event: not event["data"]["guest"])
    assert machine.exit_code is None
