"""The dirty log: no write is ever lost, on any rung, on any kind of RAM, for any user.

The guest is played by `store`, which writes by address in C as the engine's code does: past `vmm.ram`, so
that no mark can hide a write that the log missed.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.requires import requires
from tests.support.unprivileged import NOBODY, run_pytest_unprivileged
from uffd import Features, Mode, PagemapScanner, UffdError, Userfaultfd, probe, set_bits
from uffd._native import ffi, lib
from vmm.errors import CpuError
from vmm.migration import dirty_log_kernel
from vmm.migration.bitmap import Bitmap
from vmm.migration.dirty_log import (
    RUNGS,
    DirtyLog,
    DirtyLogError,
    DirtyLogUnavailable,
    Rung,
    open_dirty_log,
)
from vmm.migration.dirty_log_kernel import AsyncDirtyLog, SyncDirtyLog
from vmm.ram import GIB, GuestRam, RAMBlock, RamKind

PAGE = 4096
DEADLINE_S = 60.0


def same_page(one: bytes | bytearray, other: bytes | bytearray, page: int) -> bool:
    span = slice(page * PAGE, (page + 1) * PAGE)
    return one[span] == other[span]


class FakeCpu:
    """A CPU engine whose stores are made by the test, and logged as the real one logs its own."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._logs: dict[str, Bitmap] | None = None

    def store(self, block: RAMBlock, offset: int, data: bytes) -> None:
        lib.memory_write(block.host_address + offset, ffi.from_buffer(data), len(data))
        if self._logs is not None:
            first, last = offset // PAGE, (offset + len(data) - 1) // PAGE
            set_bits(self._logs[block.name].address, first, last - first + 1)

    def start_log(self) -> None:
        assert self._logs is None
        self._logs = {block.name: Bitmap(block.page_count) for block in self._ram.blocks}

    def aim_log(self, targets: Sequence[tuple[int, int, int, int]]) -> object:
        wanted = [(r.guest_address, r.length // PAGE, r.offset // PAGE) for r in self._ram.map]
        assert [(guest, pages, first) for guest, pages, _, first in targets] == wanted
        return [(r.block.name, r, target[2]) for r, target in zip(self._ram.map, targets, strict=True)]

    def collect_log(self, targets: Any) -> int:
        assert self._logs is not None
        fresh = 0
        for name, region, bitmap_address in targets:
            first = region.offset // PAGE
            for page in range(first, first + region.length // PAGE):
                if self._logs[name].test(page):
                    self._logs[name].clear(page)
                    word = ffi.cast("uint64_t *", bitmap_address + page // 64 * 8)
                    fresh += not word[0] >> page % 64 & 1
                    word[0] |= 1 << page % 64
        return fresh

    def stop_log(self) -> None:
        assert self._logs is not None
        self._logs = None


class Setup:
    """RAM, its guest, and a log that is stopped before the RAM goes."""

    def __init__(self, rung: Rung, kind: RamKind, *lengths: int, hole: tuple[int, int] | None = None) -> None:
        self.rung = rung
        self.ram = GuestRam([RAMBlock(f"b{i}", n, kind) for i, n in enumerate(lengths)], hole)
        self.cpu = FakeCpu(self.ram)
        self.log = self.new_log()

    def new_log(self) -> DirtyLog:
        self.log = open_dirty_log(self.ram, self.cpu, self.rung)
        return self.log

    @property
    def block(self) -> RAMBlock:
        return self.ram.blocks[0]

    def bitmaps(self) -> dict[str, Bitmap]:
        return {block.name: Bitmap(block.page_count) for block in self.ram.blocks}

    def written(self) -> list[int]:
        """What a sync reports for the first block."""
        dirty = self.bitmaps()
        assert self.log.sync(dirty) == sum(bitmap.count() for bitmap in dirty.values())
        return pages_of(dirty[self.block.name])

    def close(self) -> None:
        self.log.stop()
        self.ram.close()


def pages_of(bitmap: Bitmap) -> list[int]:
    return [first + i for first, count in bitmap.runs() for i in range(count)]


def need(rung: Rung) -> None:
    if rung == "async":
        requires("wp_async")
    if rung == "sync":
        requires("uffd")


@pytest.fixture(params=itertools.product(RUNGS, RamKind), ids=lambda p: f"{p[0]}-{p[1].name.lower()}")
def which(request: pytest.FixtureRequest) -> tuple[Rung, RamKind]:
    need(request.param[0])
    value: tuple[Rung, RamKind] = request.param
    return value


@pytest.fixture(
    params=itertools.product(("async", "sync"), RamKind), ids=lambda p: f"{p[0]}-{p[1].name.lower()}"
)
def kernel_rung(request: pytest.FixtureRequest) -> tuple[Rung, RamKind]:
    need(request.param[0])
    value: tuple[Rung, RamKind] = request.param
    return value


@pytest.fixture
def new_setup() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def new(*arguments: object, **options: object) -> Setup:
        made.append(Setup(*arguments, **options))  # type: ignore[arg-type]  # passed on as they are
        return made[-1]

    yield new
    for setup in made:
        setup.close()


NewSetup = Callable[..., Setup]


def test_populated_then_written_then_nothing(which: tuple[Rung, RamKind], new_setup: NewSetup) -> None:
    setup = new_setup(*which, 1000 * PAGE, 3 * PAGE)
    for page in (0, 63, 64, 999):
        setup.cpu.store(setup.block, page * PAGE, b"old")
    populated = setup.log.start()
    assert {name: pages_of(bitmap) for name, bitmap in populated.items()} == {
        "b0": [0, 63, 64, 999],
        "b1": [],
    }
    assert setup.written() == []
    setup.cpu.store(setup.block, 64 * PAGE - 1, b"ab")  # two pages
    setup.cpu.store(setup.block, 500 * PAGE, b"first touch")
    dirty = setup.bitmaps()
    dirty["b0"].set(63)  # known already
    assert setup.log.sync(dirty) == 2
    assert pages_of(dirty["b0"]) == [63, 64, 500]
    for _ in range(5):
        assert setup.log.sync(dirty) == 0
        assert setup.written() == []
    setup.cpu.store(setup.block, 63 * PAGE, b"x")
    setup.cpu.store(setup.ram.blocks[1], 2 * PAGE, b"x")
    dirty = setup.bitmaps()
    assert setup.log.sync(dirty) == 2
    assert {name: pages_of(bitmap) for name, bitmap in dirty.items()} == {"b0": [63], "b1": [2]}


def test_pages_that_are_only_read_are_not_in_it(which: tuple[Rung, RamKind], new_setup: NewSetup) -> None:
    """The scan after the last pass fails a migration whose guest wrote; reading a page is no write."""
    setup = new_setup(*which, 1024 * PAGE)
    setup.cpu.store(setup.block, 70 * PAGE, b"x")
    if which == ("async", RamKind.ANONYMOUS):  # elsewhere what exists counts as populated
        setup.block.read(0, 10 * PAGE)
    assert pages_of(setup.log.start()["b0"]) == [70]
    setup.block.read(0, 1000 * PAGE)
    assert setup.written() == []
    setup.cpu.store(setup.block, 5 * PAGE, b"x")
    setup.cpu.store(setup.block, 70 * PAGE, bytes(PAGE))
    setup.block.read(0, 1024 * PAGE)
    assert setup.written() == [5, 70]
    assert setup.written() == []


def test_writes_discards_and_marks_of_the_vmm_are_in_it(
    which: tuple[Rung, RamKind], new_setup: NewSetup
) -> None:
    setup = new_setup(*which, 100 * PAGE)
    setup.cpu.store(setup.block, 50 * PAGE, b"to be discarded")
    setup.log.start()
    setup.ram.write(7 * PAGE - 1, b"ab")
    setup.block.discard(50, 1)
    setup.log.mark("b0", 98, 2)
    assert setup.written() == [6, 7, 50, 98, 99]
    assert setup.written() == []
    for first, count in [(99, 2), (-1, 1), (0, 101)]:
        with pytest.raises(IndexError):
            setup.log.mark("b0", first, count)
    with pytest.raises(KeyError):
        setup.log.mark("b1", 0, 1)


@given(
    st.sampled_from(list(itertools.product(RUNGS, RamKind))),
    st.lists(
        st.one_of(
            st.tuples(st.just("store"), st.integers(0, 69), st.integers(1, 3 * PAGE)),
            st.tuples(st.just("write"), st.integers(0, 69), st.integers(1, 3 * PAGE)),
            st.tuples(st.just("discard"), st.integers(0, 69), st.integers(1, 70)),
            st.tuples(st.just("sync"), st.just(0), st.just(0)),
            st.tuples(st.just("restart"), st.just(0), st.just(0)),
        ),
        max_size=12,
    ),
)
def test_a_copy_kept_by_the_log_is_a_true_copy(
    which: tuple[Rung, RamKind], steps: list[tuple[str, int, int]]
) -> None:
    """Copying only what is populated, then only what is reported, gives the same bytes."""
    need(which[0])
    setup = Setup(*which, 70 * PAGE)
    block, copy = setup.block, bytearray(70 * PAGE)
    values = itertools.cycle(range(1, 256))

    def take(bitmap: Bitmap) -> None:
        for page in pages_of(bitmap):
            copy[page * PAGE : (page + 1) * PAGE] = block.read(page * PAGE, PAGE)

    try:
        setup.cpu.store(block, 3 * PAGE, b"before")
        take(setup.log.start()["b0"])
        for what, page, amount in [*steps, ("sync", 0, 0)]:
            length = min(amount, (70 - page) * PAGE)
            if what == "store":
                setup.cpu.store(block, page * PAGE, bytes([next(values)]) * length)
            elif what == "write":
                block.write(page * PAGE, bytes([next(values)]) * length)
            elif what == "discard":
                block.discard(page, min(amount, 70 - page))
            elif what == "restart":
                setup.log.stop()
                copy[:] = bytes(len(copy))
                take(setup.new_log().start()["b0"])
            else:
                dirty = setup.bitmaps()
                setup.log.sync(dirty)
                take(dirty["b0"])
        assert bytes(copy) == block.read(0, 70 * PAGE)
    finally:
        setup.close()


def test_no_store_of_another_thread_is_lost(kernel_rung: tuple[Rung, RamKind], new_setup: NewSetup) -> None:
    """The guest stores all the time, while the log starts, is synced, and until it is synced at last."""
    setup = new_setup(*kernel_rung, 1500 * PAGE)
    block, copy = setup.block, bytearray(1500 * PAGE)
    stop, has_begun = threading.Event(), threading.Event()

    def run_guest() -> None:
        choose = random.Random(1)
        for value in itertools.cycle(range(1, 256)):
            if stop.is_set():
                return
            page = choose.randrange(1500)
            length = min(choose.choice((1, 1, 8, 9 * PAGE, 64 * PAGE)), (1500 - page) * PAGE)
            lib.memory_fill(block.host_address + page * PAGE, value, length)  # one long run of stores
            has_begun.set()

    def take(bitmap: Bitmap) -> None:
        for page in pages_of(bitmap):
            copy[page * PAGE : (page + 1) * PAGE] = block.read(page * PAGE, PAGE)

    guest = threading.Thread(target=run_guest, daemon=True)
    guest.start()
    assert has_begun.wait(DEADLINE_S)
    take(setup.log.start()["b0"])
    passes = reported = 0
    while passes < 20 or reported < 2000:
        dirty = setup.bitmaps()
        reported += setup.log.sync(dirty)
        take(dirty["b0"])
        passes += 1
    stop.set()
    guest.join(DEADLINE_S)
    assert not guest.is_alive()
    dirty = setup.bitmaps()
    setup.log.sync(dirty)
    take(dirty["b0"])
    truth = block.read(0, 1500 * PAGE)
    lost = [page for page in range(1500) if not same_page(truth, copy, page)]
    assert lost == []
    assert setup.written() == []


def test_4_gib_with_64_mib_touched(
    kernel_rung: tuple[Rung, RamKind], new_setup: NewSetup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = new_setup(*kernel_rung, 4 * GIB)
    pages = (64 << 20) // PAGE
    lib.memory_fill(setup.block.host_address + GIB, 1, 64 << 20)
    moments = [time.perf_counter()]
    populated = setup.log.start()
    moments.append(time.perf_counter())
    assert list(populated["b0"].runs()) == [(GIB // PAGE, pages)]
    dirty = setup.bitmaps()
    moments.append(time.perf_counter())
    assert setup.log.sync(dirty) == 0
    moments.append(time.perf_counter())
    lib.memory_fill(setup.block.host_address + GIB, 2, 1 << 20)
    moments.append(time.perf_counter())
    assert setup.log.sync(dirty) == 256
    moments.append(time.perf_counter())
    arm, clean, some = ((moments[i + 1] - moments[i]) * 1e3 for i in (0, 2, 4))
    with capsys.disabled():
        print(f"\n4 GiB, 64 MiB touched, {kernel_rung[0]}, {kernel_rung[1].value}:", end=" ")
        print(f"arm {arm:.2f} ms, sync clean {clean:.2f} ms, 256 pages dirty {some:.2f} ms", end=" ")


def test_stop_leaves_the_ranges_to_others(kernel_rung: tuple[Rung, RamKind], new_setup: NewSetup) -> None:
    setup = new_setup(*kernel_rung, 100 * PAGE)
    fds = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(2):
        setup.log.start()
        setup.cpu.store(setup.block, 0, b"x")
        setup.log.stop()
        setup.log.stop()
        assert len(os.listdir("/proc/self/fd")) == fds
        assert threading.active_count() == threads
        setup.new_log()
    userfaultfd = Userfaultfd(Features.MISSING_SHMEM)
    try:
        userfaultfd.register(setup.block.host_address, setup.block.length_bytes, Mode.MISSING)
        assert userfaultfd.zeropage(setup.block.host_address + PAGE, PAGE) == (PAGE, 0)
        # While somebody else has the range, the log says so, and leaves nothing behind.
        with pytest.raises(DirtyLogError, match="EBUSY"):
            setup.log.start()
        assert threading.active_count() == threads
    finally:
        userfaultfd.unregister(setup.block.host_address, setup.block.length_bytes)
        userfaultfd.close()
    assert len(os.listdir("/proc/self/fd")) == fds
    setup.cpu.store(setup.block, 0, b"stores after stop wait for nobody")
    assert pages_of(setup.log.start()["b0"])[0] == 0


def test_a_log_that_does_not_run_knows_nothing(which: tuple[Rung, RamKind], new_setup: NewSetup) -> None:
    setup = new_setup(*which, 100 * PAGE)
    with pytest.raises(DirtyLogError, match="not running"):
        setup.log.sync(setup.bitmaps())
    setup.log.start()
    with pytest.raises(DirtyLogError, match="running already"):
        setup.log.start()
    for dirty in ({}, {"b0": Bitmap(99)}):
        with pytest.raises(ValueError, match="lack one of 100 pages"):
            setup.log.sync(dirty)
    setup.log.stop()
    with pytest.raises(DirtyLogError, match="not running"):
        setup.log.sync(setup.bitmaps())


def test_a_range_that_lost_its_registration_is_an_error_not_clean(new_setup: NewSetup) -> None:
    requires("wp_async")
    setup = new_setup("async", RamKind.ANONYMOUS, 100 * PAGE)
    setup.log.start()
    assert isinstance(setup.log, AsyncDirtyLog)
    setup.log._undo.pop_all().close()  # as a bug elsewhere would: the log still believes that it runs
    log = AsyncDirtyLog(setup.ram, {})
    log._scanner = PagemapScanner()
    try:
        with pytest.raises(DirtyLogError, match=r"'b0' failed: PAGEMAP_SCAN .* EPERM"):
            log.sync(setup.bitmaps())
    finally:
        log._scanner.close()


def test_a_fault_loop_that_ended_fails_the_sync_and_frees_the_writer(new_setup: NewSetup) -> None:
    requires("uffd")
    setup = new_setup("sync", RamKind.ANONYMOUS, 100 * PAGE)
    setup.cpu.store(setup.block, 0, b"x")
    setup.log.start()
    assert isinstance(setup.log, SyncDirtyLog)
    assert setup.log._log is not None
    setup.log._log._error = UffdError("broken by the test")
    with pytest.raises(DirtyLogError, match="'b0' failed"):
        setup.log.sync(setup.bitmaps())
    with pytest.raises(DirtyLogError, match="broken by the test"):
        setup.log.stop()
    setup.cpu.store(setup.block, 0, b"y")
    assert setup.log.fault_count == 0


@pytest.mark.parametrize("kind", RamKind)
def test_sync_before_linux_6_4_lets_all_pages_exist(kind: RamKind) -> None:
    """Without WP_UNPOPULATED an anonymous page must exist in order to be protected."""
    requires("uffd")
    ram = GuestRam([RAMBlock("b0", 100 * PAGE, kind)])
    cpu = FakeCpu(ram)
    cpu.store(ram.blocks[0], 5 * PAGE, b"x")
    log = SyncDirtyLog(ram, {}, features=Features(0))
    try:
        populated = log.start()["b0"]
        assert populated.count() == (100 if kind is RamKind.ANONYMOUS else 1)
        cpu.store(ram.blocks[0], 7 * PAGE, b"first touch")
        dirty = {"b0": Bitmap(100)}
        assert log.sync(dirty) == 1
        assert dirty["b0"].test(7)
        assert log.fault_count == 1
    finally:
        log.stop()
        ram.close()


def test_swap_takes_async_from_a_shared_memfd_and_the_exact_set_from_sync(
    monkeypatch: pytest.MonkeyPatch, new_setup: NewSetup
) -> None:
    requires("wp_async")
    monkeypatch.setattr(dirty_log_kernel, "is_swap_configured", lambda: True)
    for kind, rung, populated in [
        (RamKind.ANONYMOUS, "async", 0),
        (RamKind.MEMFD_PRIVATE, "async", 0),
        (RamKind.MEMFD_SHARED, "sync", 0),
    ]:
        setup = new_setup("engine", kind, 100 * PAGE)
        log = open_dirty_log(setup.ram, None)
        assert log.rung == rung
        assert log.start()["b0"].count() == populated
        assert ("async" in log.passed_over) == (rung == "sync")
        log.stop()
    assert new_setup("sync", RamKind.ANONYMOUS, 100 * PAGE).log.start()["b0"].count() == 100


class FakeProbe:
    """A kernel that cannot do some things."""

    def __init__(self, **reasons: str | None) -> None:
        self.features = 0
        self.why_no_wp_async = reasons.get("asynchronous")
        self.why_no_wp_sync = reasons.get("sync")


NO_LOG = "This CPU engine keeps no log of stores; use another rung"


@pytest.mark.parametrize(
    ("fake", "has_engine_log", "expected", "passed_over"),
    [
        (FakeProbe(asynchronous="too old", sync="no"), True, "engine", {}),
        (FakeProbe(), False, "async", {"engine": NO_LOG}),
        (FakeProbe(asynchronous="too old"), False, "sync", {"engine": NO_LOG, "async": "too old"}),
    ],
)
def test_the_ladder(
    fake: FakeProbe,
    has_engine_log: bool,
    expected: str,
    passed_over: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dirty_log_kernel, "probe", lambda: fake)
    ram = GuestRam([RAMBlock("b0", PAGE)])
    log = open_dirty_log(ram, FakeCpu(ram) if has_engine_log else None)
    assert log.rung == expected
    assert log.passed_over == passed_over
    assert [record.args for record in caplog.records] == list(passed_over.items())
    ram.close()


def test_no_rung_gives_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeProbe(asynchronous="too old", sync="not allowed")
    monkeypatch.setattr(dirty_log_kernel, "probe", lambda: fake)
    ram = GuestRam([RAMBlock("b0", PAGE)])
    with pytest.raises(DirtyLogUnavailable) as caught:
        open_dirty_log(ram, None)
    assert list(caught.value.reasons) == list(RUNGS)
    assert str(caught.value) == f"No dirty log: engine: {NO_LOG}; async: too old; sync: not allowed"
    for rung in (*RUNGS, "none"):
        with pytest.raises(DirtyLogUnavailable):
            open_dirty_log(ram, None, rung)  # type: ignore[arg-type]  # a string from a user
    ram.close()


def test_engine_regions_of_a_block_around_a_hole(new_setup: NewSetup) -> None:
    """Also one that begins in the middle of a word of the block's bitmap."""
    hole = (100 * PAGE, 300 * PAGE)
    setup = new_setup("engine", RamKind.ANONYMOUS, 250 * PAGE, hole=hole)
    assert [region.length // PAGE for region in setup.ram.map] == [100, 150]
    setup.log.start()
    for page in (0, 99, 100, 101, 249):
        setup.cpu.store(setup.block, page * PAGE, b"x")
    dirty = setup.bitmaps()
    dirty["b0"].set(101)
    assert setup.log.sync(dirty) == 4
    assert pages_of(dirty["b0"]) == [0, 99, 100, 101, 249]
    assert setup.written() == []


def test_an_engine_that_fails_is_a_failed_log(monkeypatch: pytest.MonkeyPatch, new_setup: NewSetup) -> None:
    setup = new_setup("engine", RamKind.ANONYMOUS, 100 * PAGE)

    def fail(*_: object) -> None:
        raise CpuError("no safe point")

    def check(name: str, what: str, call: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(setup.cpu, name, fail)
            with pytest.raises(DirtyLogError, match=f"could not be {what}: no safe point"):
                call()

    check("start_log", "started", setup.log.start)
    with pytest.raises(DirtyLogError, match="not running"):
        setup.log.sync(setup.bitmaps())
    setup.log.start()
    check("collect_log", "synced", lambda: setup.log.sync(setup.bitmaps()))
    setup.log.stop()
    with monkeypatch.context() as patch:  # bound when the log starts
        patch.setattr(setup.cpu, "stop_log", fail)
        setup.log.start()
        with pytest.raises(DirtyLogError, match="could not be stopped"):
            setup.log.stop()


def test_engine_without_a_pagemap_takes_all_for_populated(
    monkeypatch: pytest.MonkeyPatch, new_setup: NewSetup, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise UffdError("no /proc")

    monkeypatch.setattr("vmm.ram.PagemapScanner", fail)
    setup = new_setup("engine", RamKind.ANONYMOUS, 100 * PAGE)
    assert setup.log.start()["b0"].count() == 100
    assert "no /proc" in caplog.text


def test_all_of_this_without_privileges() -> None:
    """As nobody, through userfaultfd(2) with UFFD_USER_MODE_ONLY if that is all there is."""
    requires("uffd")
    if os.geteuid() == NOBODY:
        pytest.skip("This is that run")
    here = os.path.relpath(__file__)
    output = run_pytest_unprivileged(here, "-k", "not without_privileges", "tests/uffd")
    assert " passed" in output
    if probe().why_no_wp_async is None:
        assert "wp_async" not in output  # nothing was skipped for want of it
