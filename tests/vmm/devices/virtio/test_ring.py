"""The split virtqueue against a plain driver, and against drivers that break its rules."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.virtio_driver import INDIRECT, NEXT, WRITE, Driver, memory
from vmm.devices.virtio.device import RING_FEATURES, S_NEEDS_RESET, VirtioDevice
from vmm.devices.virtio.ring import gather, length_of, scatter
from vmm.devices.virtio.transport import MmioTransport
from vmm.ram import GuestRam

MIB = 1 << 20
VERSION_1 = 1 << 32


class Echo(VirtioDevice):
    """Gives back what it reads."""

    kind = "echo"
    device_id = 63

    def __init__(self, ram: GuestRam) -> None:
        super().__init__(ram, [16])
        self.levels: list[bool] = []
        self.set_irq = self.levels.append
        self.told = 0
        self.paused = False

    def notified(self, index: int) -> None:
        queue = self.queues[index]
        while chain := queue.pop():
            data = gather(self.ram, chain.readable, 0, length_of(chain.readable))
            if queue.push(chain, scatter(self.ram, chain.writable, 0, data)):
                self.told += 1
                self.interrupt(1)


def made(features: int = RING_FEATURES, size: int = 16) -> tuple[Echo, Driver]:
    ram = memory()
    device = Echo(ram)
    driver = Driver(ram, MmioTransport(device), size)
    driver.start([0], features)
    return device, driver


REQUEST = st.tuples(
    st.lists(st.binary(min_size=1, max_size=300), max_size=4),
    st.lists(st.integers(1, 300), max_size=4),
    st.booleans(),
).filter(lambda request: request[0] or request[1])


@given(st.lists(REQUEST, min_size=1, max_size=40), st.sampled_from([8, 16]), st.booleans())
def test_a_device_gives_back_what_a_driver_sends(
    requests: list[tuple[list[bytes], list[int], bool]], size: int, event_idx: bool
) -> None:
    device, driver = made(RING_FEATURES if event_idx else VERSION_1 | 1 << 28, size)
    for readable, writable, indirect in requests:
        places = driver.send(0, readable, writable, indirect=indirect)
        driver.notify(0)
        sent = b"".join(readable)[: sum(writable)]
        assert driver.used(0) == [(0, len(sent))]
        got = b"".join(driver.ram.read(at, size) for at, size in zip(places, writable, strict=True))
        assert got[: len(sent)] == sent
        assert driver.get(0x60) == 1 or event_idx
        driver.put(0x64, 1)
    assert not device.broken
    assert not device.levels[-1]


def test_the_index_wraps() -> None:
    device, driver = made(size=8)
    queue = device.queues[0]
    queue.last_avail = queue.used_idx = driver.next_avail[0] = driver.next_used[0] = 0xFFF8
    for _ in range(24):
        driver.send(0, [b"a"], [])
        if driver.next_avail[0] % 8 == 0:
            driver.notify(0)
            assert len(driver.used(0)) == 8
    assert (driver.next_used[0], device.broken) == (16, False)


def test_an_interrupt_that_is_not_wanted_does_not_come() -> None:
    device, driver = made(VERSION_1)
    driver.ram.write(driver.ring(0)[1], struct.pack("<H", 1))
    driver.send(0, [b"a"], [])
    driver.notify(0)
    assert (len(driver.used(0)), device.told) == (1, 0)


def test_with_event_index_the_interrupt_comes_at_the_entry_that_was_asked_for() -> None:
    device, driver = made()
    driver.send(0, [b"a"], [])
    driver.notify(0)
    assert device.told == 1
    driver.ram.write(driver.ring(0)[1] + 4 + 2 * driver.size, struct.pack("<H", 3))  # used_event
    for told in (1, 1, 2):
        driver.send(0, [b"a"], [])
        driver.notify(0)
        assert device.told == told
    (asked,) = struct.unpack("<H", driver.ram.read(driver.ring(0)[2] + 4 + 8 * driver.size, 2))
    assert asked == driver.next_avail[0], "the device asks to be told of the next request"


def loop(driver: Driver) -> None:
    driver.describe(0, 0, 0x80000, 16, NEXT, 1)
    driver.describe(0, 1, 0x80000, 16, NEXT, 0)


def backwards(driver: Driver) -> None:
    driver.describe(0, 0, 0x80000, 16, WRITE | NEXT, 1)
    driver.describe(0, 1, 0x80000, 16, 0)


def nested(driver: Driver) -> None:
    driver.describe(0, 0, 0x80000, 16, INDIRECT)
    driver.ram.write(0x80000, struct.pack("<QIHH", 0x80000, 16, INDIRECT, 0))


HOSTILE: dict[str, Callable[[Driver], object]] = {
    "a loop": loop,
    "a next that is none": lambda driver: driver.describe(0, 0, 0x80000, 16, NEXT, 16),
    "a buffer beyond RAM": lambda driver: driver.describe(0, 0, 4 * MIB - 8, 16, 0),
    "a buffer at the end of all addresses": lambda driver: driver.describe(0, 0, (1 << 64) - 8, 16, 0),
    "device registers": lambda driver: driver.describe(0, 0, 0xFEB00000, 16, WRITE),
    "an empty buffer": lambda driver: driver.describe(0, 0, 0x80000, 0, 0),
    "readable behind writable": backwards,
    "an indirect table with a rest": lambda driver: driver.describe(0, 0, 0x80000, 24, INDIRECT),
    "an empty indirect table": lambda driver: driver.describe(0, 0, 0x80000, 0, INDIRECT),
    "a huge indirect table": lambda driver: driver.describe(0, 0, 0x80000, 16 * 1025, INDIRECT),
    "an indirect table beyond RAM": lambda driver: driver.describe(0, 0, 8 * MIB, 16, INDIRECT),
    "an indirect table in the chain": lambda driver: driver.describe(0, 0, 0x80000, 16, INDIRECT | NEXT, 1),
    "an indirect table in itself": nested,
    "a head that is none": lambda driver: driver.ram.write(driver.ring(0)[1] + 4, b"\x10\x00"),
    "an index far ahead": lambda driver: driver.ram.write(driver.ring(0)[1] + 2, b"\x12\x00"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_driver_that_breaks_the_rules_breaks_its_device_only(what: str) -> None:
    device, driver = made()
    driver.describe(0, 0, 0x80000, 16, 0)
    driver.offer(0, 0)
    HOSTILE[what](driver)
    driver.notify(0)
    assert device.broken
    assert driver.get(0x70) & S_NEEDS_RESET
    assert driver.get(0x60) == 2, "a configuration interrupt says so"
    driver.notify(0)
    assert driver.used(0) == []
    driver.start([0])
    driver.send(0, [b"again"], [5])
    driver.notify(0)
    assert driver.used(0) == [(0, 5)]


@given(st.binary(max_size=64 * 16), st.binary(max_size=44))
def test_no_bytes_in_the_rings_harm_more_than_the_device(descriptors: bytes, available: bytes) -> None:
    _, driver = made()
    driver.ram.write(driver.ring(0)[0], descriptors)
    driver.ram.write(driver.ring(0)[1], available)
    driver.notify(0)
    driver.start([0])
    assert driver.get(0x70) == 15


@pytest.mark.parametrize("ring", range(3))
@pytest.mark.parametrize("address", [4 * MIB - 8, 1 << 40, (1 << 64) - 16])
def test_a_ring_that_is_not_in_ram_is_no_ring(ring: int, address: int) -> None:
    device, driver = made()
    driver.put(0x44, 0)
    driver.put(0x80 + 0x10 * ring, address & 0xFFFFFFFF)
    driver.put(0x84 + 0x10 * ring, address >> 32)
    driver.put(0x44, 1)
    assert driver.get(0x44) == 0
    assert device.broken


@pytest.mark.parametrize("size", [0, 3, 1025, 2048, 0xFFFFFFFF])
def test_a_size_that_is_none_is_ignored(size: int) -> None:
    device, driver = made()
    driver.put(0x44, 0)
    driver.put(0x38, size)
    assert device.queues[0].size == 16


def test_while_paused_nothing_is_begun_and_afterwards_all_is() -> None:
    class Worker(Echo):
        def process(self) -> bool:
            self.guard(lambda: Echo.notified(self, 0))
            return False

    ram = memory()
    device = Worker(ram)
    driver = Driver(ram, MmioTransport(device))
    driver.start([0])
    device.pause()
    driver.send(0, [b"a"], [1])
    driver.notify(0)
    assert device.wait_idle(5)
    assert driver.used(0) == []
    device.resume()
    assert device.wait_idle(5)
    assert driver.used(0) == [(0, 1)]
    assert device.close(5)


def test_a_transport_without_a_device_is_passed_over() -> None:
    empty = MmioTransport()
    assert [empty.read(offset, 4) for offset in (0, 4, 8, 0xC)] == [0x74726976, 2, 0, 0x554D4551]
    for offset in range(0, 0x200, 4):
        empty.write(offset, 4, 0xFFFFFFFF)


@given(
    st.lists(st.tuples(st.integers(0, 0x1FF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)))
)
def test_no_access_to_the_registers_raises(accesses: list[tuple[int, int, int]]) -> None:
    _, driver = made()
    for offset, size, value in accesses:
        driver.transport.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= driver.transport.read(offset, size) < 1 << 64
