"""The engine object itself: its checks at start, its neighbours, its errors."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import vmm.cpu.engine
from vmm.cpu.engine import Engine
from vmm.cpu.errors import CpuError, EngineMismatch


def test_the_engine_beside_an_imported_unicorn() -> None:
    """The wheel's own library in the same process is another one, and both work."""
    unicorn = pytest.importorskip("unicorn", reason="the wheel is there wherever the engine was built")
    other = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    other.mem_map(0x1000, 0x1000)
    other.mem_write(0x1000, b"\xff\xc0\x90")
    ours = Engine()
    other.emu_start(0x1000, 0x1002)
    assert other.reg_read(unicorn.x86_const.UC_X86_REG_RAX) == 1
    assert ours.get_cpu_state()["env.regs"][2] == ours.model.cpuid_version
    ours.close()


def test_an_error_says_what_could_not_be_done() -> None:
    engine = Engine()
    with pytest.raises(CpuError, match=r"Cannot map 0x1 bytes of RAM at 0x0"):
        engine.map_ram(0, 0x1000, 1)
    engine.close()
    engine.close()


def test_another_unicorn_is_refused_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    class AnotherUnicorn:
        pf_on_port_read = pf_on_port_write = pf_on_mmio_read = pf_on_mmio_write = vmm.cpu.engine.ffi.NULL

        def pf_create(self, out: Any, handle: Any, callbacks: Any, mismatch: Any) -> int:
            mismatch.what = b"version"
            mismatch.expected, mismatch.got = 0x020104FF, 0x020105FF
            return -errno.EPROTO

    monkeypatch.setattr(vmm.cpu.engine, "lib", AnotherUnicorn())
    with pytest.raises(EngineMismatch, match=r"version is 0x20105ff, expected 0x20104ff") as refused:
        Engine()
    assert (refused.value.expected, refused.value.got) == (0x020104FF, 0x020105FF)
