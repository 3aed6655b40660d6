"""Stopping a vCPU from another thread: no instruction twice, no stop lost; and the pause protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.vmm.cpu.conftest import Box
from vmm.cpu.engine import Exit, ExitReason
from vmm.cpu.errors import CpuError
from vmm.cpu.vcpu import Vcpu

pytestmark = pytest.mark.usefixtures("short_switch_interval")

STOPS = 20_000

# The register counts first, so between two blocks the counts are equal and inside they differ by one at most.
# One loop per kind of read-modify-write; the counter lies in a page of its own, or beside the code.
LOOPS = {
    "inc": "1: incl %ebx; incl (COUNTER); jmp 1b",
    "lock add": "1: incl %ebx; lock addl $1, (COUNTER); jmp 1b",
    "xadd": "1: incl %ebx; movl $1, %eax; xaddl %eax, (COUNTER); jmp 1b",
    "push pop": "1: incl %ebx; pushl (COUNTER); popl %eax; incl %eax; movl %eax, (COUNTER); jmp 1b",
}


@pytest.fixture
def vcpu(box: Box) -> Iterator[Vcpu]:
    made = Vcpu(box.engine)
    yield made
    assert made.shutdown(10)


def stop_many_times(box: Box, vcpu: Vcpu, counter: int, stops: int) -> int:
    """Stops the guest that often, each time after it ran; gives how often the counts differed."""
    wrong = 0
    for _ in range(stops):
        before = box.u32(counter)
        vcpu.resume()
        while box.u32(counter) == before:
            time.sleep(0)
        vcpu.request_pause()
        assert vcpu.wait_paused(10), "a stop was lost"
        ebx = box.engine.get_cpu_state()["env.regs"][3]
        wrong += ebx != box.u32(counter)
    return wrong


@pytest.mark.slow
def test_20000_stops_of_a_read_modify_write_loop(box: Box, vcpu: Vcpu) -> None:
    box.load(LOOPS["inc"].replace("COUNTER", "0x20000"), 32)
    vcpu.start_thread()
    assert stop_many_times(box, vcpu, 0x20000, STOPS) == 0
    assert box.engine.counters()[0] >= STOPS


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LOOPS))
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("counter", [0x6000, 0x7E00], ids=["own page", "beside the code"])
def test_each_kind_of_read_modify_write(box: Box, vcpu: Vcpu, kind: str, bits: int, counter: int) -> None:
    box.load(LOOPS[kind].replace("COUNTER", hex(counter)), bits)
    vcpu.start_thread()
    assert stop_many_times(box, vcpu, counter, 150) == 0


def test_a_stop_before_the_start_is_kept(box: Box) -> None:
    box.load("jmp .", 32)
    box.engine.clear_stop()
    box.engine.request_stop()
    assert box.engine.run() == Exit(ExitReason.STOPPED)
    assert box.engine.counters()[0] == 0


def test_a_new_vcpu_is_paused(box: Box, vcpu: Vcpu) -> None:
    assert vcpu.is_paused
    assert vcpu.wait_paused(0)
    box.load("jmp .", 32)
    vcpu.start_thread()
    assert vcpu.wait_paused(10)
    assert box.engine.counters()[0] == 0


def test_state_cannot_be_had_while_running(box: Box, vcpu: Vcpu) -> None:
    box.load("1: incl (0x20000); jmp 1b", 32)
    state = box.engine.get_cpu_state()
    vcpu.start_thread()
    vcpu.resume()
    while not box.u32(0x20000):
        time.sleep(0)
    assert not vcpu.is_paused
    for call in (
        box.engine.get_cpu_state,
        lambda: box.engine.set_cpu_state(state),
        lambda: setattr(box.engine, "halted", True),
        box.engine.run,
        box.engine.close,
    ):
        with pytest.raises(CpuError, match="while the vCPU runs"):
            call()


def test_a_halted_vcpu_pauses_and_wakes_by_an_interrupt(box: Box, vcpu: Vcpu) -> None:
    box.load("sti; hlt; incl (0x6000); hlt; hlt", 16)
    box.set_irq_base(0x20)
    box.put(0x21 * 4, (0x1000).to_bytes(4, "little"))
    box.put(0x1000, b"\xcf")  # iret
    vcpu.start_thread()
    vcpu.resume()
    while not box.engine.halted:
        time.sleep(0)
    assert not vcpu.is_paused
    vcpu.request_pause()
    assert vcpu.wait_paused(10)
    assert box.engine.halted
    vcpu.resume()
    box.engine.set_irq(1, True)
    while not box.u32(0x6000):
        time.sleep(0)


def test_an_exit_pauses_before_the_handler_runs_and_acknowledges_after(box: Box, vcpu: Vcpu) -> None:
    box.load("movb $1, %al; outb %al, $0xf4; jmp .", 32)
    seen: list[tuple[Exit, bool, str]] = []
    release = threading.Event()

    def on_exit(result: Exit) -> None:
        seen.append((result, vcpu.wait_paused(0), threading.current_thread().name))
        release.wait()

    vcpu.on_exit = on_exit
    vcpu.start_thread()
    vcpu.resume()
    while not seen:
        time.sleep(0)
    assert not vcpu.wait_paused(0.01)
    release.set()
    assert vcpu.wait_paused(10)
    assert seen == [(Exit(ExitReason.LATCHED), True, "vcpu")]


def test_a_handler_may_let_the_guest_go_on(box: Box, vcpu: Vcpu) -> None:
    box.load("1: outb %al, $0xf4; incl (0x20000); jmp 1b", 32)
    vcpu.on_exit = lambda result: vcpu.resume() if box.u32(0x20000) < 100 else None
    vcpu.start_thread()
    vcpu.resume()
    assert vcpu.wait_paused(10)
    assert 100 <= box.u32(0x20000) <= 102


def test_waiting_for_oneself_in_a_port_handler_is_an_error(box: Box, vcpu: Vcpu) -> None:
    box.load("outb %al, $0x80; jmp .", 32)

    def write(port: int, size: int, value: int) -> None:
        vcpu.wait_paused()

    box.engine.set_port_handlers(lambda port, size: 0, write)
    seen: list[Exit] = []
    vcpu.on_exit = seen.append
    vcpu.start_thread()
    vcpu.resume()
    assert vcpu.wait_paused(10)
    assert seen[0].reason is ExitReason.INTERNAL_ERROR
    assert "cannot wait for its own vCPU" in seen[0].text


def test_an_exception_in_the_thread_is_raised_at_shutdown(box: Box) -> None:
    box.load("outb %al, $0xf4", 32)
    vcpu = Vcpu(box.engine)

    def on_exit(result: Exit) -> None:
        raise ZeroDivisionError

    vcpu.on_exit = on_exit
    vcpu.start_thread()
    vcpu.resume()
    assert vcpu.wait_paused(10)
    with pytest.raises(ZeroDivisionError):
        vcpu.shutdown(10)
    assert isinstance(vcpu.error, ZeroDivisionError)


def test_work_at_a_safe_point_is_done_while_the_guest_runs(box: Box, vcpu: Vcpu) -> None:
    box.load("1: incl %ebx; incl (0x20000); jmp 1b", 32)
    vcpu.start_thread()
    vcpu.resume()
    for _ in range(200):
        before = box.u32(0x20000)
        while box.u32(0x20000) == before:
            time.sleep(0)
        box.engine.flush()
    vcpu.request_pause()
    assert vcpu.wait_paused(10)
    assert box.regs()[3] == box.u32(0x20000)


def test_a_vcpu_whose_thread_has_ended_stays_paused(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset and `cont` after the failure let nothing run; a later stop must not wait for ever."""

    def fail(*, waits: bool) -> Exit:
        raise RuntimeError("the thread ends")

    vcpu = Vcpu(box.engine)
    monkeypatch.setattr(box.engine, "run", fail)
    vcpu.start_thread()
    vcpu.resume()
    assert vcpu.wait_paused(10)
    vcpu.resume()
    vcpu.request_pause()
    assert vcpu.wait_paused(0.1)
    with pytest.raises(RuntimeError):
        vcpu.shutdown(10)
