"""A bare computer for the tests of the CPU: an engine, RAM, and the modes a guest can start in."""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.assemble import assemble
from vmm.app import SWITCH_INTERVAL_S
from vmm.cpu.cpuid import CpuModel
from vmm.cpu.engine import Engine, Exit, ExitReason
from vmm.vmstate import Values

ORIGIN = 0x7C00
EXIT_PORT = 0xF4
OUT_PORT = 0xE9

FLAT_CODE32 = {"selector": 0x08, "base": 0, "limit": 0xFFFFFFFF, "flags": 0xCF9B00}
FLAT_CODE64 = {"selector": 0x08, "base": 0, "limit": 0xFFFFFFFF, "flags": 0xAF9B00}
FLAT_DATA = {"selector": 0x10, "base": 0, "limit": 0xFFFFFFFF, "flags": 0xCF9300}
GDT_AT = 0x500
PAGE_TABLES_AT = 0x9000
ALIAS, ALIAS_TABLES = 0x40000000, 0x1E0000


class Box:
    """Engine and RAM. Bytes written to port 0xe9 land in `output`; port 0xf4 latches."""

    def __init__(self, ram_bytes: int = 2 << 20, model: CpuModel | None = None) -> None:
        self.ram = mmap.mmap(-1, ram_bytes, mmap.MAP_PRIVATE)
        self._buffer = (ctypes.c_char * ram_bytes).from_buffer(self.ram)
        self.host_address = ctypes.addressof(self._buffer)
        self.engine = Engine(model)
        self.engine.map_ram(0, self.host_address, ram_bytes)
        self.engine.set_port_handlers(self._read, self._write)
        self.output = bytearray()
        self.exit_codes: list[int] = []

    def _read(self, port: int, size: int) -> int:
        return port & 0xFF

    def _write(self, port: int, size: int, value: int) -> None:
        if port == EXIT_PORT:
            self.exit_codes.append(value)
            self.engine.latch()
        elif port == OUT_PORT:
            self.output += value.to_bytes(size, "little")

    def set_irq_base(self, vector: int) -> None:
        """Interrupt line N comes as `vector` + N."""
        first, second = self.engine.get_pics()
        self.engine.set_pics(first | {"irq_base": vector}, second)

    def put(self, address: int, data: bytes) -> None:
        self.ram[address : address + len(data)] = data

    def u32(self, address: int) -> int:
        return int(struct.unpack_from("<I", self.ram, address)[0])

    def u64(self, address: int) -> int:
        return int(struct.unpack_from("<Q", self.ram, address)[0])

    def load(self, text: str, bits: int, origin: int = ORIGIN, **changes: Any) -> Values:
        """Assembles a guest and sets the CPU to start it in the mode that `bits` says."""
        self.put(origin, assemble(text, origin, bits))
        state = {16: self.real_mode, 32: self.protected_mode, 64: self.long_mode}[bits]()
        state |= {"env.eip": origin, **changes}
        self.engine.set_cpu_state(state)
        return state

    def _blank(self) -> Values:
        self.engine.reset()
        state = self.engine.get_cpu_state()
        state["env.regs"] = [0] * 16
        state["env.regs"][4] = 0x7000
        return state

    def real_mode(self) -> Values:
        state = self._blank()
        state["env.segs"][1] |= {"selector": 0, "base": 0}
        return state

    def protected_mode(self) -> Values:
        state = self._blank()
        self.put(GDT_AT, struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
        state["env.gdt"] |= {"base": GDT_AT, "limit": 0x17}
        state["env.segs"] = [dict(FLAT_CODE32 if i == 1 else FLAT_DATA) for i in range(6)]
        state["env.cr[0]"] = 0x60000011
        state["env.hflags"] = 0xB0  # PE, SS32, CS32
        return state

    def long_mode(self) -> Values:
        state = self.protected_mode()
        self.put(GDT_AT + 8, struct.pack("<Q", 0x00AF9B000000FFFF))
        base = PAGE_TABLES_AT
        self.put(base, struct.pack("<Q", base + 0x1000 | 7))
        self.put(base + 0x1000, struct.pack("<Q", base + 0x2000 | 7))
        self.put(base + 0x2000, b"".join(struct.pack("<Q", i << 21 | 0x87) for i in range(512)))
        state["env.segs"][1] = dict(FLAT_CODE64)
        state["env.cr[0]"] = 0x80000011
        state["env.cr[3]"] = base
        state["env.cr[4]"] = 0x620  # PAE, OSFXSR, OSXMMEXCPT
        state["env.efer"] = 0x501  # SCE, LME, LMA
        state["env.hflags"] = 0xB0 | 1 << 14 | 1 << 15 | 1 << 22  # LMA, CS64, OSFXSR
        return state

    def run(self) -> Exit:
        """Runs on this thread until the guest ends the run by itself."""
        self.engine.clear_stop()
        return self.engine.run()

    def run_to_latch(self) -> None:
        result = self.run()
        assert result.reason is ExitReason.LATCHED, (result, self.engine.get_cpu_state()["env.eip"])

    def regs(self) -> list[int]:
        return list(self.engine.get_cpu_state()["env.regs"])

    def close(self) -> None:
        """Frees engine and RAM; the RAM's users must be closed before."""
        self.engine.close()


def with_alias(box: Box, flags: int) -> None:
    """Maps 4 KiB pages at ALIAS to the first 2 MiB, with `flags`."""
    tables = ALIAS_TABLES
    box.put(PAGE_TABLES_AT + 0x1000 + 8, struct.pack("<Q", tables | 7))
    box.put(tables, struct.pack("<Q", (tables + 0x1000) | 7))
    entries = b"".join(struct.pack("<Q", i * 4096 | flags) for i in range(512))
    box.put(tables + 0x1000, entries)


@pytest.fixture
def box() -> Iterator[Box]:
    made = Box()
    yield made
    made.close()


@pytest.fixture
def another_box() -> Iterator[Box]:
    made = Box()
    yield made
    made.close()


@pytest.fixture
def short_switch_interval() -> Iterator[None]:
    """As the program has it: no thread of Python's keeps another waiting for long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    yield
    sys.setswitchinterval(before)
