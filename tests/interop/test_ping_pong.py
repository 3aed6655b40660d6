"""Twenty hops, Pageferry - stock - Pageferry - ..., of one guest that checks itself all the while.

longmode keeps a value it knows in registers, segment bases, x87, SSE and control words and in every page;
what it says must be whole over all the machines it ran on. The boot sector does the like in real mode.
"""

from __future__ import annotations

import pathlib
import string

import pytest

from tests.functional.harness import VM, Stable, StockVM, audit, guest_options
from tests.interop.peers import MICROVM, hop
from tests.support.assemble import assemble

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

HOPS = 20
MEMORY = "36M"
LONG_MODE = "start=0x2000000 pages=256 ratio=2 beat=16 flush=1"

REAL_MODE = """
    cli
    xor %ax, %ax
    mov %ax, %ss
    mov $0x7000, %sp
    mov $0x2000, %ax
    mov %ax, %ds
    mov $0x3000, %ax
    mov %ax, %es
    mov $0x4000, %ax
    mov %ax, %fs
    mov $0x5000, %ax
    mov %ax, %gs
    xor %ecx, %ecx              # ECX = the round
    mov $'a', %bl               # BL = its letter
    mov $0xc0de0000, %esi       # the upper halves, too, travel in real mode
    fninit
    fldz                        # ST0 = the round
round:
    inc %ecx
    inc %esi
    fld1
    faddp
    mov %cx, %ds:0
    mov %cx, %es:0
    mov %cx, %fs:0
    mov %cx, %gs:0
    mov $0x2000, %di            # most of the time passes here
1:  dec %di
    jnz 1b
    cmp %cx, %ds:0
    jne bad
    cmp %cx, %es:0
    jne bad
    cmp %cx, %fs:0
    jne bad
    cmp %cx, %gs:0
    jne bad
    fistl %ds:8
    cmp %ecx, %ds:8
    jne bad
    mov %esi, %eax
    sub $0xc0de0000, %eax
    cmp %ecx, %eax
    jne bad
    mov %bl, %al
    call put
    inc %bl
    cmp $'z', %bl
    jbe round
    mov $'a', %bl
    jmp round
bad:
    mov $'!', %al
    call put
    jmp round
put:
    push %ax
    mov $0x3fd, %dx
2:  in %dx, %al
    test $0x20, %al
    jz 2b
    pop %ax
    mov $0x3f8, %dx
    out %al, %dx
    ret
"""


async def grown(machine: VM, count: int) -> None:
    """Wait until the guest has said so many bytes more."""
    begin = len(machine.output())
    await machine.wait_output(lambda text: len(text) >= begin + count)


async def ping_pong(stable: Stable, guest: list[str], hops: int, *, stop_stock: bool = False) -> list[str]:
    """The guest's output on each machine; hops alternate between precopy and postcopy."""
    stock = ["-M", f"{MICROVM},isa-serial=on", "-m", MEMORY, "-cpu", "qemu64", "-incoming", "defer"]
    machine = await stable.start("hop0", *guest)
    outputs = []
    for number in range(1, hops + 1):
        await grown(machine, 40)
        kind = StockVM if number % 2 else VM
        options = stock if kind is StockVM else [*guest, "-incoming", "defer"]
        following = await stable.start(f"hop{number}", *options, kind=kind)
        if stop_stock and isinstance(machine, StockVM):
            await machine.qmp("stop")  # TCG of 7.2 loses the writes of a guest that fits into its TLB
        await hop(machine, following, "precopy" if number % 4 in (1, 2) else "postcopy")
        if stop_stock and isinstance(machine, StockVM):
            await following.qmp("cont")
        outputs.append(machine.output())
        await machine.close()
        machine = following
    await grown(machine, 40)
    return [*outputs, machine.output()]


async def test_long_mode(stable: Stable) -> None:
    guest = guest_options("longmode", LONG_MODE, MEMORY, MICROVM)
    outputs = await ping_pong(stable, guest, HOPS)
    assert len(outputs) == HOPS + 1
    verdict = audit(*outputs)
    assert verdict.is_good, verdict


async def test_real_mode(stable: Stable, tmp_path: pathlib.Path) -> None:
    image = tmp_path / "boot.img"
    image.write_bytes(assemble(REAL_MODE, 0x7C00, 16).ljust(510, b"\0") + b"\x55\xaa")
    guest = ["-M", MICROVM, "-m", MEMORY, "-drive", f"file={image},format=raw"]
    said = "".join(await ping_pong(stable, guest, 8, stop_stock=True))
    alphabet = string.ascii_lowercase * (len(said) // 26 + 1)
    assert said == alphabet[: len(said)]
