"""A vCPU that waits in C for a missing page: it cannot be paused, and nobody else waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.assemble import assemble
from tests.support.requires import requires
from uffd import PAGE_SIZE_BYTES, Mapping, Mode, Userfaultfd
from vmm.cpu.engine import Engine
from vmm.cpu.errors import EngineBusy, EngineTimeout
from vmm.cpu.vcpu import Vcpu

LENGTH = 1 << 20
MISSING = 0x40000

TOUCHES = {
    "load": f"1: incl %ebx; movl {MISSING:#x}, %eax; movl %eax, 0x20000; jmp 1b",
    "store": f"1: incl %ebx; movl %ebx, {MISSING:#x}; movl %ebx, 0x20000; jmp 1b",
    "fetch": f"call {MISSING:#x}; 1: incl %ebx; movl %ebx, 0x20000; jmp 1b",
}


class Guest:
    def __init__(self, text: str) -> None:
        self.ram = Mapping(LENGTH)
        self.engine = Engine()
        self.engine.map_ram(0, self.ram.address, LENGTH)
        self.ram.write(0x7C00, assemble(text, 0x7C00, 32))
        state = self.engine.get_cpu_state()
        data = {"selector": 16, "base": 0, "limit": 0xFFFFFFFF, "flags": 0xCF9300}
        state["env.segs"] = [data | ({"selector": 8, "flags": 0xCF9B00} if i == 1 else {}) for i in range(6)]
        state |= {"env.cr[0]": 0x60000011, "env.hflags": 0xB0, "env.eip": 0x7C00}
        state["env.regs"][4] = 0x7000
        self.engine.set_cpu_state(state)
        self.vcpu = Vcpu(self.engine)
        self.uffd = Userfaultfd()
        self.uffd.register(self.ram.address + MISSING, PAGE_SIZE_BYTES, Mode.MISSING)

    def place(self) -> None:
        page = Mapping(PAGE_SIZE_BYTES)
        page.write(0, b"\xc3" + bytes(11))  # ret, for the one that executes it
        assert self.uffd.copy(self.ram.address + MISSING, page.address, PAGE_SIZE_BYTES).errno == 0
        page.close()


@pytest.fixture(params=sorted(TOUCHES))
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    requires("uffd")
    made = Guest(TOUCHES[request.param])
    yield made
    assert made.vcpu.shutdown(10)
    made.uffd.unregister(made.ram.address + MISSING, PAGE_SIZE_BYTES)
    made.uffd.close()
    made.engine.close()
    made.ram.close()


def test_a_parked_vcpu_does_not_acknowledge_until_its_page_is_there(guest: Guest) -> None:
    guest.vcpu.start_thread()
    guest.vcpu.resume()
    while not guest.uffd.read_faults_nowait():
        time.sleep(0)
    guest.vcpu.request_pause()
    assert not guest.vcpu.wait_paused(0.02)
    assert not guest.vcpu.is_paused
    assert not guest.vcpu.shutdown(0.01)
    with pytest.raises(EngineBusy):
        guest.engine.get_cpu_state()
    with pytest.raises(EngineTimeout):
        guest.engine.invalidate(0, LENGTH, 0.01)
    guest.place()
    assert guest.vcpu.wait_paused(10)
    assert guest.engine.get_cpu_state()["env.eip"] >= 0x7C00


def test_other_python_threads_run_on(guest: Guest) -> None:
    """This thread does Python work while the vCPU is parked: a held GIL would stop it for ever."""
    guest.vcpu.start_thread()
    guest.vcpu.resume()
    while not guest.uffd.read_faults_nowait():
        time.sleep(0)
    assert sum(range(100_000)) == 4_999_950_000
    guest.place()
    guest.vcpu.request_pause()
    assert guest.vcpu.wait_paused(10)
