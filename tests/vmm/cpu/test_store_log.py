"""The log of guest stores: nothing that the kernel has seen written is missing from it."""

from __future__ import annotations

import array
import hashlib
import mmap
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.assemble import assemble
from tests.support.kernel_witness import KernelWitness, pages_of
from tests.vmm.cpu.conftest import ALIAS, ALIAS_TABLES, GDT_AT, PAGE_TABLES_AT, Box, with_alias
from vmm.cpu.errors import CpuError
from vmm.cpu.vcpu import Vcpu
from vmm.migration.bitmap import Bitmap
from vmm.vmstate import Values

PAGE = 4096
NX = 1 << 63


class Log:
    """The engine's log over all RAM, and what hashing says: the pages that changed since `mark`."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.pages = len(box.ram) // PAGE
        self.bitmap = array.array("Q", bytes((self.pages + 63) // 64 * 8))
        self.hashes = self._hash()
        self.targets = box.engine.aim_log([(0, self.pages, self.bitmap.buffer_info()[0], 0)])

    def _hash(self) -> list[bytes]:
        ram = memoryview(self.box.ram)
        return [hashlib.blake2b(ram[i * PAGE : (i + 1) * PAGE]).digest() for i in range(self.pages)]

    def collect(self) -> set[int]:
        for i in range(len(self.bitmap)):
            self.bitmap[i] = 0
        count = self.box.engine.collect_log(self.targets)
        found = {i for i in range(self.pages) if self.bitmap[i // 64] >> (i % 64) & 1}
        assert count == len(found)
        return found

    def changed(self) -> set[int]:
        before, self.hashes = self.hashes, self._hash()
        return {i for i in range(self.pages) if before[i] != self.hashes[i]}


WRITER32 = """
        movl $0x1234567, %eax
    1:  imull $1103515245, %eax, %eax; addl $12345, %eax; movl %eax, %edi; shrl $12, %edi; andl $0xffffc, %edi
        addl $0x100000, %edi; incl (%edi); movl %eax, %edx; andl $0x3fc, %edx; incl (%edx, %ebp)
        testl $0xff0000, %eax; jnz 1b; outb %al, $0x80; jmp 1b
"""

WRITER64 = WRITER32.replace("(%edi)", f"{ALIAS:#x}(%rdi)").replace("(%edx, %ebp)", "(%rdx, %rbp)")


@pytest.fixture
def running(request: pytest.FixtureRequest, box: Box) -> Iterator[tuple[Box, Vcpu]]:
    vcpu = Vcpu(box.engine)
    yield box, vcpu
    assert vcpu.shutdown(10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "paged", "paged NX alias"])
def test_the_store_log_misses_nothing(running: tuple[Box, Vcpu], kind: str) -> None:
    box, vcpu = running
    state = box.load(WRITER32 if kind == "flat" else WRITER64, 32 if kind == "flat" else 64)
    state["env.regs"][5] = 0x7C00 + 1024  # counters beside the code
    if kind != "flat":
        with_alias(box, 0x3 | (NX if "NX" in kind else 0))
        state["env.efer"] = 0xD01
    box.engine.set_cpu_state(state)
    log = Log(box)
    vcpu.start_thread()
    box.engine.start_log()
    collected: set[int] = set()
    missed: set[int] = set()
    for _ in range(12):
        vcpu.resume()
        for _ in range(5):  # while the guest runs: every page goes into one collection or the next
            time.sleep(0.002)
            collected |= log.collect()
        vcpu.request_pause()
        assert vcpu.wait_paused(10)
        collected |= log.collect()
        changed = log.changed()
        assert len(changed) > 100
        missed |= changed - collected
        assert log.collect() == set()
        collected.clear()
    assert missed == set()
    box.engine.stop_log()
    box.engine.stop_log()


def test_the_store_log_reports_each_page_once(box: Box) -> None:
    box.load("1: incl 0x20000; incl 0x20004; incl 0x31ffe; outb %al, $0xf4; jmp 1b", 32)
    log = Log(box)
    box.engine.start_log()
    for _ in range(4):
        box.run_to_latch()
        assert log.collect() == {0x20, 0x31, 0x32}
        assert log.collect() == set()
    box.engine.stop_log()
    box.run_to_latch()
    box.engine.start_log()
    assert log.collect() == set()
    box.run_to_latch()
    assert log.collect() == {0x20, 0x31, 0x32}


def test_the_page_walkers_accessed_and_dirty_bits_are_logged(box: Box) -> None:
    box.load(f"1: movb {ALIAS:#x}, %al; outb %al, $0xf4; jmp 1b", 64)
    with_alias(box, 7)
    log = Log(box)
    box.engine.flush()
    box.engine.start_log()
    box.run_to_latch()
    assert {0x1E0, 0x1E1} <= log.collect()
    assert box.u64(0x1E1000) & 0x20


@pytest.mark.parametrize("first", [0, 1, 63, 64, 70])
def test_the_log_is_ored_into_what_is_there(box: Box, first: int) -> None:
    """Wherever the first page is in the bitmap."""
    box.load("incl 0x20000; incl 0x21000; incl 0x3f000; outb %al, $0xf4; jmp .", 32)
    box.engine.start_log()
    box.run_to_latch()
    before = 1 << first + 0x20 | 1 << first + 0x30
    words = array.array("Q", before.to_bytes(80, "little"))
    targets = box.engine.aim_log([(0, 512, words.buffer_info()[0], first)])
    assert box.engine.collect_log(targets) == 2
    assert int.from_bytes(words.tobytes(), "little") == before | 1 << first + 0x21 | 1 << first + 0x3F
    assert box.engine.collect_log(targets) == 0


@pytest.mark.parametrize(
    "targets",
    [[], [(0x1000, 511, 0, 0)], [(0, 511, 0, 0)], [(0, 513, 0, 0)], [(0, 512, 4, 0)], [(0, 512, 0, 0)] * 2],
)
def test_targets_that_do_not_fit_ram_are_an_error(box: Box, targets: list[tuple[int, int, int, int]]) -> None:
    """What is taken out of the log must go somewhere."""
    words = array.array("Q", bytes(80))
    address = words.buffer_info()[0]
    box.engine.start_log()
    with pytest.raises(CpuError):
        box.engine.collect_log(box.engine.aim_log([(g, n, address + at, bit) for g, n, at, bit in targets]))


def test_the_log_must_be_started_once(box: Box) -> None:
    log = Log(box)
    with pytest.raises(CpuError):
        log.collect()
    box.engine.start_log()
    with pytest.raises(CpuError):
        box.engine.start_log()


def test_a_guest_that_stores_nothing_is_not_asked(box: Box) -> None:
    """No safe point for an empty log: a vCPU that cannot reach one does not hold up a sync."""
    box.load("1: inb $0x80, %al; jmp 1b", 32)
    entered, leave = threading.Event(), threading.Event()

    def wait(port: int, size: int) -> int:
        box.engine.collect_log(log.targets)  # on the vCPU's own thread
        entered.set()
        assert leave.wait(10)
        return 0

    box.engine.set_port_handlers(wait, lambda port, size, value: None)
    vcpu = Vcpu(box.engine)
    vcpu.start_thread()
    log = Log(box)
    box.engine.start_log()
    vcpu.resume()
    assert entered.wait(10)
    assert log.collect() == set()
    vcpu.request_pause()
    leave.set()
    assert vcpu.shutdown(10)


# The kernel as a witness: guests that store in every way there is

RAM_BYTES = 8 << 20
DATA, DATA_MASK = 0x200000, 0x3FFFFF
HANDLER, FAR_POINTER, FAR_TARGET, PATCHED, IDT_AT, TSS_AT = 0x6000, 0x6100, 0x6200, 0x18000, 0x19000, 0x1A000
COLLECT, END = 0x80, 0xF4
ROUNDS = 60

COMMON = {
    "byte": "movb %al, (%edi)",
    "long across pages": "orl $0xffd, %edi; movl %eax, (%edi)",
    "rep stosb": "movl $5000, %ecx; rep stosb",
    "rep movsl": "movl $2300, %ecx; movl $0x100000, %esi; rep movsl",
    "rep stosl backwards": "std; movl $1300, %ecx; rep stosl; cld",
    "lock inc": "lock incl (%edi)",
    "lock xadd": "lock xaddl %eax, (%edi)",
    "lock cmpxchg": "movl (%edi), %eax; lock cmpxchgl %ecx, (%edi)",
    "failed cmpxchg": "movl (%edi), %eax; notl %eax; cmpxchgl %ecx, (%edi)",
    "cmpxchg8b": "lock cmpxchg8b (%edi)",
    "xchg": "xchgl %eax, (%edi)",
    "lock bts": "lock btsl $5, (%edi)",
    "bit far away": "movl $80000, %ecx; btcl %ecx, (%edi)",
    "fxsave": "andl $-16, %edi; fxsave (%edi)",
    "fxsave across pages": "andl $-16, %edi; orl $0xf00, %edi; fxsave (%edi)",
    "fnsave": "fnsave (%edi)",
    "x87 stores": "fldpi; fstpt (%edi); fldpi; fistpl 0x3000(%edi); fnstenv 0x6000(%edi)",
    "SSE stores": "andl $-16, %edi; movups %xmm0, 1(%edi); movntdq %xmm0, 0x2000(%edi)",
    "movnti": "movnti %eax, (%edi); stmxcsr 0x3000(%edi)",
    "setcc": "setc (%edi); rolb 0x2000(%edi); shldl $3, %eax, 0x4000(%edi)",
    "rep insb": "movl $4500, %ecx; movl $0x70, %edx; rep insb",
    "system tables": "sgdt (%edi); sidt 0x2000(%edi); smsw 0x4000(%edi); str 0x6000(%edi)",
    "accessed bit of a descriptor": f"movb $0x92, {GDT_AT + 0x1D:#x}; outb %al, $0x81;"
    "movw $0x18, %cx; movw %cx, %es",
    "patched code": f"incb {PATCHED + 1:#x}; movl ${PATCHED:#x}, %ecx; call *%{{c}}cx",
}
LONG_ONLY = {
    "cmpxchg16b": "andl $-16, %edi; lock cmpxchg16b (%rdi)",
    "maskmovdqu": "pcmpeqd %xmm1, %xmm1; maskmovdqu %xmm1, %xmm0",
    "fxsave64": "andl $-16, %edi; fxsave64 (%rdi)",
    "frames": "movl %edi, %ebp; movq %rdi, %rsp; pushq %rax; pushfq; pushw %ax; call 1f; 1: enter $64, $3",
    "interrupt": "movq %rdi, %rsp; int $0x30",
    "far call": f"movq %rdi, %rsp; lcall *{FAR_POINTER:#x}",
    "alias": f"andl $0x1fffff, %edi; orl ${DATA:#x}, %edi; movb %al, {ALIAS - DATA:#x}(%rdi);"
    f"outb %al, $0x81; movb %al, (%rdi); outb %al, $0x81; incb {ALIAS - DATA:#x}(%rdi)",
    "accessed and dirty bits": f"movl %edi, %ecx; shrl $12, %ecx; andl $0x1ff, %ecx;"
    f"andl $~0x60, {ALIAS_TABLES + 0x1000:#x}(, %rcx, 8); movq %cr3, %rdx; movq %rdx, %cr3; outb %al, $0x81;"
    f"shll $12, %ecx; movb {ALIAS:#x}(%rcx), %dl; outb %al, $0x81; movb %dl, {ALIAS:#x}(%rcx)",
    "bits of a large page": f"andl $~0x60, {PAGE_TABLES_AT + 0x2010:#x}; movq %cr3, %rdx; movq %rdx, %cr3;"
    f"outb %al, $0x81; movb {DATA:#x}, %dl; outb %al, $0x81; movb %dl, {DATA:#x}",
}
PROTECTED_ONLY = {
    "frames": "movl %edi, %ebp; movl %edi, %esp; pushal; pushfl; pushw %ax; call 1f; 1: enter $64, $3",
    "interrupt": "movl %edi, %esp; int $0x30",
    "far call": f"movl %edi, %esp; lcall $8, ${FAR_TARGET:#x}",
    "busy bit of a task": f"movb $0x89, {GDT_AT + 0x25:#x}; outb %al, $0x81; movw $0x20, %cx; ltr %cx",
}


def storing_guest(box: Box, bits: int) -> list[str]:
    """Loads one that does all of these, at random places, and tells after each which it was; their names."""
    kinds = {**COMMON, **(LONG_ONLY if bits == 64 else PROTECTED_ONLY)}
    parts = []
    for number, text in enumerate(kinds.values()):
        parts.append(
            "imull $1103515245, %ebx, %ebx; addl $12345, %ebx; movl %ebx, %edi; shrl $7, %edi;"
            f"andl ${DATA_MASK:#x}, %edi; addl ${DATA:#x}, %edi; movl %ebx, %eax;"
            f"{text.replace('{c}', 'r' if bits == 64 else 'e')};"
            f"movl $0x5000, %esp; movl ${number}, %eax; outb %al, ${COLLECT:#x}"
        )
    end = f"incl counter; cmpl ${ROUNDS}, counter; jb again; outb %al, ${END:#x}; jmp again; counter: .long 0"
    text = f"again: {'; '.join(parts)}; {end}"
    state = box.load(text, bits, origin=0x20000)
    system_tables(box, bits, state)
    box.engine.set_cpu_state(state)
    return list(kinds)


def system_tables(box: Box, bits: int, state: Values) -> None:
    """Descriptors, an interrupt gate, code to be called and patched, and a second address of the data."""
    box.put(GDT_AT + 0x18, struct.pack("<Q", 0x00CF92000000FFFF))
    box.put(GDT_AT + 0x20, struct.pack("<QQ", 0x0000890000000067 | TSS_AT << 16, 0))
    state["env.gdt"] |= {"base": GDT_AT, "limit": 0x2F}
    box.put(HANDLER, assemble("iretq" if bits == 64 else "iretl", HANDLER, bits))
    box.put(FAR_POINTER, struct.pack("<IH", FAR_TARGET, 8))
    box.put(FAR_TARGET, assemble("lretl", FAR_TARGET, bits))
    box.put(PATCHED, assemble("movb $0, %al; ret", PATCHED, bits))
    gate = struct.pack("<HHHHQ", HANDLER, 8, 0x8E00, 0, 0)
    box.put(IDT_AT + 0x30 * bits // 4, gate[: bits // 4])
    state["env.cr[4]"] = 0x600 | 0x20 * (bits == 64)  # OSFXSR, OSXMMEXCPT, PAE
    state["env.hflags"] |= 1 << 22  # OSFXSR
    state["env.idt"] |= {"base": IDT_AT, "limit": 0x7FF}
    if bits == 64:
        with_alias(box, 7)
        box.put(ALIAS_TABLES + 0x1000, b"".join(struct.pack("<Q", DATA + i * PAGE | 7) for i in range(512)))


class Trial:
    """The engine's log and the kernel's over the same RAM."""

    def __init__(self, box: Box, *, forgets: Callable[[int], bool] = lambda page: False) -> None:
        pages = len(box.ram) // PAGE
        box.ram.madvise(mmap.MADV_NOHUGEPAGE)  # the kernel would call all of a new huge page written
        self._engine = box.engine
        self._forgets = forgets
        self._taken, self._logged = Bitmap(pages), Bitmap(pages)
        self._targets = box.engine.aim_log([(0, pages, self._taken.address, 0)])
        self.witness = KernelWitness({"ram": (box.host_address, pages)})
        box.engine.start_log()
        self.seen = 0

    def collect(self) -> None:
        """As a bitmap sync does."""
        self._engine.collect_log(self._targets)
        for page in pages_of(self._taken):
            if not self._forgets(page):
                self._logged.set(page)
        self._taken.fill(False)

    def missing(self) -> list[int]:
        """No store is under way: what has the kernel seen that the log has not, since the last call?"""
        written = self.witness.take()["ram"]
        self.collect()
        self.seen += written.count()
        written.andnot(self._logged)
        self._logged.fill(False)
        return pages_of(written)


def on_trial(box: Box, bits: int, **options: Any) -> tuple[dict[str, list[int]], Trial]:
    """Runs the guest to its end, comparing after each of its stores: what was missed, by kind."""
    kinds = storing_guest(box, bits)
    trial, missed = Trial(box, **options), {}

    def write(port: int, size: int, value: int) -> None:
        if port == END:
            box.engine.latch()
        elif (pages := trial.missing()) and port == COLLECT:
            missed[kinds[value & 0xFF]] = pages
        elif pages:
            missed["half way"] = pages

    choose = random.Random(1)

    def read(port: int, size: int) -> int:
        """In the middle of an instruction that stores."""
        if choose.random() < 0.01 and (pages := trial.missing()):
            missed["rep insb, half way"] = pages
        return 0x5A

    box.engine.set_port_handlers(read, write)
    try:
        box.run_to_latch()
    finally:
        trial.witness.close()
    return missed, trial


@pytest.fixture
def large_box() -> Iterator[Box]:
    box = Box(ram_bytes=RAM_BYTES)
    yield box
    box.close()


@pytest.mark.parametrize("bits", [32, 64])
def test_the_kernel_has_seen_no_store_that_the_log_has_not(large_box: Box, bits: int) -> None:
    missed, trial = on_trial(large_box, bits)
    assert missed == {}
    assert trial.seen > 40 * ROUNDS


def test_a_log_that_forgets_one_page_in_a_hundred_is_found_out(large_box: Box) -> None:
    missed, _ = on_trial(large_box, 64, forgets=lambda page: page % 100 == 7)
    assert missed


def test_what_is_stored_between_two_safe_points_is_in_the_log(large_box: Box) -> None:
    """Collected again and again while the guest runs, at any instruction; compared while it stands still."""
    box = large_box
    storing_guest(box, 64)
    box.engine.set_port_handlers(lambda port, size: 0x5A, lambda port, size, value: None)
    vcpu = Vcpu(box.engine)
    trial = Trial(box)
    vcpu.start_thread()
    try:
        while trial.seen < 3000:
            vcpu.resume()
            for _ in range(20):
                trial.collect()
                time.sleep(0.0005)  # the guest works
            vcpu.request_pause()
            assert vcpu.wait_paused(10)
            assert trial.missing() == []
    finally:
        assert vcpu.shutdown(10)
        trial.witness.close()
