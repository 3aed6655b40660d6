"""The CPU's state, bit for bit: made up in a stream, taken by both, and read in what they send.

    made up -> stock -> Pageferry -> file          made up -> Pageferry -> stock -> socket

Both files are read by the vmdescription that their writer put into them, not by our tables. Values are
arbitrary but such that a CPU can have them; one that has never run the guest must give back every one.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
from typing import Any

import pytest

from tests.functional.harness import VM, Stable, StockVM
from tests.interop.peers import hop, receive
from tools.stream_walk import read_described, vmdescription
from vmm.cpu.state import CPU_COMMON_DESCRIPTION, CPU_DESCRIPTION, reset_values
from vmm.machine_sections import GlobalStateSection, TimerSection
from vmm.migration import stream
from vmm.migration.ram_records import EndOfBody, MemSize, RamWriter, ZeroPage
from vmm.vmstate import BytesSource, Description, Values, encode

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

MIB = 1 << 20
STOCK = ("-M", "none", "-cpu", "qemu64,-apic,apic-id=0", "-m", "1", "-S", "-incoming", "defer")
OURS = ("-M", "none", "-cpu", "qemu64", "-m", "1", "-S", "-incoming", "defer")
RANDOM = random.Random(7)
NOT_A_REGISTER = {"env.tsc"}
"""Time: Pageferry writes what the guest would read."""


def u64() -> int:
    return RANDOM.getrandbits(64)


def segment(selector: int, flags: int, limit: int = 0xFFFFFFFF, base: int = 0) -> Values:
    return {"selector": selector, "base": base, "limit": limit, "flags": flags}


def arbitrary() -> Values:
    """Everything that no mode has a say in."""
    values = reset_values(0x60FB1)
    values |= {
        "env.regs": [u64() for _ in range(16)],
        "env.fpuc": 0x27F,
        "env.fpus_vmstate": 0x3800 | 0x41,
        "env.fptag_vmstate": 0x81,
        "env.fpregs": [{"mant": u64() | 1 << 63, "exp": RANDOM.getrandbits(15)} for _ in range(8)],
        "env.mxcsr": 0x7FA1,
        "env.xmm_regs[0]": [{"_q_ZMMReg[0]": u64(), "_q_ZMMReg[1]": u64()} for _ in range(16)],
        "env.cr[2]": u64() & 0xFFFFFFFF,
        "env.dr": [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xFFFF0FF1, 0x400],
        "env.ldt": segment(0x38, 0x8200, 0xFF, 0x7000),
        "env.tr": segment(0x40, 0x8B00, 0x67, 0x8000),
        "env.gdt": segment(0, 0, 0x7F, 0x500),
        "env.idt": segment(0, 0, 0x3FF, 0x600),
        "env.sysenter_cs": 0x18,
        "env.sysenter_esp": u64(),
        "env.sysenter_eip": u64(),
        "env.star": u64(),
        "env.lstar": u64(),
        "env.cstar": u64(),
        "env.fmask": u64() & 0xFFFFFFFF,
        "env.kernelgsbase": u64(),
        "env.pat": 0x0007010600070106,
        "env.tsc_aux": 0x1234,
        "env.tsc_offset": 0x123456789,
        "env.mtrr_fixed": [0x0606060606060606] * 11,
        "env.mtrr_deftype": 0xC06,
        "env.mtrr_var": [{"base": n << 24 | 6, "mask": 0xFFFF000800} for n in range(8)],
        "env.mcg_status": 4,
        "env.mce_banks": [u64() for _ in range(40)],
        "env.system_time_msr": 0x5001,
        "env.wall_clock_msr": 0x6000,
    }
    return values


def real_mode() -> Values:
    """Hidden bases and limits are not those of the selectors: "unreal" mode, which only they can carry."""
    values = arbitrary()
    data = [segment(n << 8, 0x9300, 0xFFFF, n << 12) for n in range(6)]
    data[1] = segment(0x100, 0x9B00, 0xFFFF, 0x1000)
    data[4] = segment(0x400, 0x8F9300, 0xFFFFFFFF, 0x123000)
    values |= {"env.segs": data, "env.eip": 0x1234, "env.eflags": 0x246, "env.hflags": 0x40}
    return values | {"env.cr[0]": 0x60000010, "env.cr[3]": 0, "env.cr[4]": 0x200, "env.efer": 0}


def protected_mode() -> Values:
    """Ring 3, 32 bits, an expand-down stack and a data segment with a base."""
    values = arbitrary()
    data = [segment(0x23, 0xCFF300) for _ in range(6)]
    data[1] = segment(0x1B, 0xCFFB00)
    data[2] = segment(0x2B, 0x40F700, 0x1000, 0x10000)
    hflags = 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 22
    values |= {"env.segs": data, "env.eip": 0x40123, "env.eflags": 0x3216, "env.hflags": hflags | 3 << 12}
    return values | {"env.cr[0]": 0x80000033, "env.cr[3]": 0x9000, "env.cr[4]": 0x690, "env.efer": 0}


def long_mode() -> Values:
    """64 bits, FS and GS with bases, a page table and system calls set up."""
    values = arbitrary()
    data = [segment(0x10, 0xCF9300) for _ in range(6)]
    data[1] = segment(0x08, 0xAF9B00)
    data[4] = segment(0, 0xC09300, 0xFFFFFFFF, 0xFFFF800001234000)
    data[5] = segment(0, 0xC09300, 0xFFFFFFFF, 0xFFFF900000005678)
    hflags = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 9 | 1 << 14 | 1 << 15 | 1 << 22
    values |= {"env.segs": data, "env.eip": 0xFFFF800000041234, "env.eflags": 0x10A97, "env.hflags": hflags}
    values |= {"env.cr[2]": u64(), "env.cr[0]": 0x80010033, "env.cr[3]": 0x9000, "env.cr[4]": 0x6F0}
    return values | {"env.efer": 0xD01}


MODES = {"real": real_mode, "protected": protected_mode, "long": long_mode}


def section(number: int, name: str, description: Description, values: Values) -> list[bytes]:
    return [
        stream.encode(stream.SectionFull(number, name, 0, description.version)),
        encode(description, values),
        stream.encode(stream.SectionFooter(number)),
    ]


def made_up(cpu: Values) -> bytes:
    """A stream with empty RAM and this CPU."""
    ram, state = RamWriter(), GlobalStateSection()
    pages = b"".join(ram.write(ZeroPage("ram", page)) for page in range(0, MIB, 4096))
    return b"".join(
        [
            stream.encode(stream.Header()),
            stream.encode(stream.Configuration("none")),
            stream.encode(stream.SectionStart(2, "ram", 0, 4)),
            ram.write(MemSize((("ram", MIB),))) + ram.write(EndOfBody()),
            stream.encode(stream.SectionFooter(2)),
            stream.encode(stream.SectionEnd(2)),
            pages + ram.write(EndOfBody()),
            stream.encode(stream.SectionFooter(2)),
            *section(0, "timer", TimerSection.description, {"cpu_ticks_offset": 5, "cpu_clock_offset": 7}),
            *section(4, "cpu_common", CPU_COMMON_DESCRIPTION, {"halted": 0, "interrupt_request": 0}),
            *section(5, "cpu", CPU_DESCRIPTION, cpu),
            *section(6, "globalstate", GlobalStateSection.description, state.save()),
            stream.encode(stream.EndOfStream()),
        ]
    )


def cpu_in(raw: bytes) -> Values:
    """The CPU's values in a stream, read by what the stream says of itself."""
    shown = vmdescription(raw)
    assert shown is not None
    device = next(each for each in shown["devices"] if each["name"] == "cpu")
    head = b"\x03cpu\0\0\0\0\0\0\0\x0c"
    return read_described(device, BytesSource(raw, raw.rindex(head) + len(head)))


def flat(value: Any, name: str = "") -> dict[str, int]:
    """Every number of a state by a name of its own; the x87 registers' wrapper of stock's is left out."""
    if isinstance(value, dict):
        found: dict[str, int] = {}
        for key, each in value.items():
            plain = key.removeprefix("tmp_")
            found |= flat(each, name if key == "tmp" else f"{name}.{plain}")
        return found
    if isinstance(value, list):
        return {k: v for i, each in enumerate(value) for k, v in flat(each, f"{name}[{i}]").items()}
    return {name.lstrip("."): value}


def differences(expected: Values, got: Values) -> dict[str, Any]:
    one, other = flat(expected), flat(got)
    names = (one.keys() | other.keys()) - NOT_A_REGISTER
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


async def load(machine: VM, raw: bytes) -> None:
    path = machine.folder / "made-up"
    path.write_bytes(raw)
    uri = f"exec:cat {path}" if isinstance(machine, StockVM) else f"file:{path}"
    await machine.set_capabilities(events=True)
    await machine.qmp("migrate-incoming", uri=uri)
    await machine.wait_migration()


@pytest.mark.parametrize("mode", MODES)
async def test_made_up_states_pass_through_both(stable: Stable, tmp_path: pathlib.Path, mode: str) -> None:
    cpu = MODES[mode]()
    stock = await stable.start("stock", *STOCK, kind=StockVM)
    await load(stock, made_up(cpu))
    ours = await stable.start("ours", *OURS)
    await hop(stock, ours, "precopy")
    await ours.qmp("migrate", uri=f"file:{tmp_path / 'ours'}")
    await ours.wait_migration()
    assert differences(cpu, cpu_in((tmp_path / "ours").read_bytes())) == {}

    ours = await stable.start("ours-first", *OURS)
    await load(ours, made_up(cpu))
    stock = await stable.start("stock-last", *STOCK, kind=StockVM)
    await hop(ours, stock, "precopy")
    receiving = asyncio.create_task(receive(tmp_path / "socket"))
    await asyncio.sleep(0)
    await stock.qmp("migrate", uri=f"unix:{tmp_path / 'socket'}")
    assert differences(cpu, cpu_in(await receiving)) == {}
