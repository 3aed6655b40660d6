"""The head of a core file: the notes are stock's byte for byte, and readers find what is described."""

from __future__ import annotations

import json
import pathlib
import struct
import subprocess

from tests.support.requires import requires
from vmm.control.core_file import core_head
from vmm.cpu.cpuid import CpuModel
from vmm.cpu.state import reset_values

REGIONS = [(0, 0x1000), (1 << 32, 0x2000)]
PHDR = "<IIQQQQQQ"


def segments(core: bytes) -> list[tuple[int, ...]]:
    offset, size, count = struct.unpack_from("<Q", core, 32)[0], *struct.unpack_from("<HH", core, 54)
    return [struct.unpack_from(PHDR, core, offset + index * size) for index in range(count)]


def notes_of(core: bytes) -> bytes:
    (note,) = (segment for segment in segments(core) if segment[0] == 4)
    return core[note[2] : note[2] + note[5]]


def test_regions_follow_each_other() -> None:
    head = core_head(reset_values(0), REGIONS)
    loads = [segment for segment in segments(head) if segment[0] == 1]
    assert [(load[4], load[5]) for load in loads] == REGIONS
    assert [load[2] for load in loads] == [len(head), len(head) + 0x1000]


def test_a_cpu_in_long_mode_has_the_registers_of_x86_64() -> None:
    cpu = reset_values(0)
    cpu["env.efer"] |= 1 << 10
    cpu["env.regs"] = list(range(100, 116))
    cpu["env.eip"] = 0xFFFF_FFFF_8100_0000
    notes = notes_of(core_head(cpu, REGIONS))
    name, size, kind = struct.unpack_from("<III", notes)
    assert (name, size, kind) == (5, 336, 1)
    regs = struct.unpack_from("<27Q", notes, 20 + 112)
    assert regs[:2] == (115, 114)
    assert regs[10] == 100
    assert regs[16] == cpu["env.eip"]
    assert regs[19] == 104


def test_stocks_notes_are_ours(tmp_path: pathlib.Path) -> None:
    requires("qemu")
    path = tmp_path / "core"
    commands = (
        {"execute": "qmp_capabilities"},
        {"execute": "dump-guest-memory", "arguments": {"paging": False, "protocol": f"file:{path}"}},
        {"execute": "quit"},
    )
    machine = ("-M", "microvm", "-cpu", "qemu64", "-m", "8M", "-S", "-display", "none", "-nodefaults")
    subprocess.run(
        ["qemu-system-x86_64", *machine, "-qmp", "stdio"],
        input="".join(json.dumps(command) + "\n" for command in commands),
        text=True,
        check=True,
        capture_output=True,
        timeout=30,
    )
    ours = core_head(reset_values(CpuModel.parse("qemu64").cpuid_version), REGIONS)
    assert notes_of(path.read_bytes()) == notes_of(ours)
