"""Blocktime and latencies of faults, held against the clock of the threads that waited."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.real_machines import Sides
from tests.support.requires import requires
from uffd import Features, Mode, Userfaultfd
from vmm.migration.blocktime import Blocktime
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.page_pump.receiver import PageReceiver, ReturnPathWriter
from vmm.migration.ram_records import EndOfBody, Page, RamWriter, ZeroPage
from vmm.ram import RAMBlock

PAGE = 4096
SECTION = (2).to_bytes(4, "big")


def test_the_members_are_qemus() -> None:
    assert Blocktime(7_900_000, 4, 100, 1, 40, (0,) * 24).query() == {
        "postcopy-blocktime": 7,
        "postcopy-vcpu-blocktime": [7],
        "postcopy-latency": 25,
        "postcopy-latency-dist": [0] * 24,
        "postcopy-vcpu-latency": [40],
        "postcopy-non-vcpu-latency": 20,
    }


def test_without_a_fault_everything_is_0() -> None:
    figures = Blocktime(0, 0, 0, 0, 0, (0,) * 24).query()
    assert figures["postcopy-latency"] == figures["postcopy-non-vcpu-latency"] == 0
    assert figures["postcopy-vcpu-latency"] == [0]


class Toucher(threading.Thread):
    """Reads pages in C without the GIL, and notes when it began with each."""

    def __init__(self, block: RAMBlock, pages: list[int]) -> None:
        super().__init__()
        self._block, self._pages = block, pages
        self.since_ns: list[int] = []
        self.gate = threading.Event()

    def run(self) -> None:
        self.gate.wait()
        for page in self._pages:
            self.since_ns.append(time.monotonic_ns())
            self._block.read(page * PAGE, PAGE, may_wait=True)


class Listening:
    """A destination from LISTEN on; this test is its source, page by page."""

    def __init__(self) -> None:
        self.block = RAMBlock("ram", 16 * PAGE)
        self.peer, ours = socket.socketpair()
        self._ours = ours
        ours.setblocking(False)
        self.peer.settimeout(60)
        self._cancel = CancelEvent()
        self._return_path = ReturnPathWriter(ours.fileno(), self._cancel.fd)
        self.receiver = PageReceiver([self.block], StreamReader(ours.fileno(), self._cancel.fd))
        self._uffd = Userfaultfd(Features.THREAD_ID)
        self._uffd.register(self.block.host_address, self.block.length_bytes, Mode.MISSING)
        self._thread = threading.Thread(target=self._listen)
        self._records = RamWriter()
        self.peer.sendall(b"\x02" + SECTION)
        self._thread.start()

    def _listen(self) -> None:
        self.receiver.listen(self._uffd.fd, self._return_path, 2)

    def wait_request(self) -> int:
        """The page that was asked for, and no more than that."""
        head = self.peer.recv(4, socket.MSG_WAITALL)
        payload = self.peer.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL)
        return int.from_bytes(payload[:8], "big") // PAGE

    def send(self, page: int) -> None:
        self.peer.sendall(self._records.write(Page("ram", page * PAGE, b"\x55" * PAGE)))

    def send_zero(self, page: int) -> None:
        self.peer.sendall(self._records.write(ZeroPage("ram", page * PAGE)))

    def end(self) -> None:
        """EOF, with every page that is missing as zero; the counters stand still after that."""
        received = self.receiver.received["ram"]
        while (page := received.find_next_clear(0)) is not None:
            self.send_zero(page)
            while not received.test(page):
                pass
        self.peer.sendall(self._records.write(EndOfBody()) + b"\x7e" + SECTION + b"\0")
        self._thread.join()

    def close(self) -> None:
        self._cancel.set()
        self._thread.join()
        self._uffd.unregister(self.block.host_address, self.block.length_bytes)
        self._uffd.close()
        self._return_path.close()
        self._cancel.close()
        self.peer.close()
        self._ours.close()
        self.block.close()


@pytest.fixture
def listening() -> Iterator[Listening]:
    requires("uffd")
    made = Listening()
    yield made
    made.close()


def test_a_wait_is_counted_to_the_clock_of_who_waited(listening: Listening) -> None:
    """Never shorter than from the request to the page, never longer than from the touch to the count."""
    vcpu, other = Toucher(listening.block, [3, 9]), Toucher(listening.block, [5])
    at_least_ns, counted_ns = {}, {}
    for toucher in (vcpu, other):
        toucher.start()
        toucher.gate.set()
    assert vcpu.native_id is not None
    listening.receiver.struct.vcpu_thread = vcpu.native_id
    for number in range(3):
        page = listening.wait_request()
        since_ns = time.monotonic_ns()
        time.sleep(0.02)  # what is measured
        at_least_ns[page] = time.monotonic_ns() - since_ns
        listening.send(page)
        while listening.receiver.struct.latency_count <= number:
            pass
        counted_ns[page] = time.monotonic_ns()
    for toucher in (vcpu, other):
        toucher.join()
    listening.end()
    at_most_ns = counted_ns[3] + counted_ns[9] - sum(vcpu.since_ns)
    waits = listening.receiver.blocktime()
    assert (waits.count, waits.vcpu_count) == (3, 2)
    assert at_least_ns[3] + at_least_ns[9] <= waits.vcpu_latency_sum_ns <= at_most_ns
    assert waits.vcpu_blocked_ns == waits.vcpu_latency_sum_ns
    others_ns = waits.latency_sum_ns - waits.vcpu_latency_sum_ns
    assert at_least_ns[5] <= others_ns <= counted_ns[5] - other.since_ns[0]
    assert sum(waits.buckets[14:]) == 3, "16 ms and more"


def test_two_threads_that_wait_for_one_page_are_two_waits_and_one_request(listening: Listening) -> None:
    touchers = [Toucher(listening.block, [3]) for _ in range(2)]
    for toucher in touchers:
        toucher.start()
        toucher.gate.set()
    assert listening.wait_request() == 3
    while listening.receiver.struct.in_flight < 2:
        pass
    listening.send(3)
    for toucher in touchers:
        toucher.join()
    listening.end()
    waits = listening.receiver.blocktime()
    assert (waits.count, waits.vcpu_count, listening.receiver.struct.requests) == (2, 0, 1)


def test_a_page_that_came_as_zero_blocks_too_but_is_no_remote_fault(listening: Listening) -> None:
    listening.send_zero(3)
    while not listening.receiver.received["ram"].test(3):
        pass
    toucher = Toucher(listening.block, [3])
    toucher.start()
    assert toucher.native_id is not None
    listening.receiver.struct.vcpu_thread = toucher.native_id
    toucher.gate.set()
    toucher.join()
    listening.end()
    waits = listening.receiver.blocktime()
    assert waits.count == 0
    assert 0 < waits.vcpu_blocked_ns <= time.monotonic_ns() - toucher.since_ns[0]


def test_query_migrate_shows_it_with_the_capability_alone(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair("auditor", "pages=256 beat=4")
    destination.capability("postcopy-blocktime")
    source.wait_heartbeat()
    assert "postcopy-blocktime" not in destination.migrator.query()
    machines.to_postcopy(source, destination)
    destination.wait_heartbeat()
    machines.finish(source, destination)
    shown = destination.migrator.query()
    assert shown["postcopy-vcpu-blocktime"] == [shown["postcopy-blocktime"]]
    assert sum(shown["postcopy-latency-dist"]) == shown["x-fault-latency"]["count"] > 0
    assert shown["postcopy-vcpu-latency"][0] > 0
    assert shown["postcopy-vcpu-latency"] == [shown["postcopy-latency"]], "no other thread touched a page"
    assert "postcopy-blocktime" not in source.migrator.query()
    destination.migrator.set_capabilities([{"capability": "postcopy-blocktime", "state": False}])
    assert "postcopy-blocktime" not in destination.migrator.query()
