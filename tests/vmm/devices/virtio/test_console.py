"""virtio-console and virtio-rng: control messages, output against a slow backend, input, random bytes."""

from __future__ import annotations

import struct

import pytest

from tests.support.virtio_driver import Driver, memory
from vmm.devices.virtio.console import VirtioConsole
from vmm.devices.virtio.rng import VirtioRng
from vmm.devices.virtio.state import VirtioSection
from vmm.devices.virtio.transport import MmioTransport
from vmm.vmstate import BytesSource, decode, encode

INPUT, OUTPUT, CONTROL_IN, CONTROL_OUT = range(4)
READY, ADD, PORT_READY, CONSOLE, OPEN = 0, 1, 3, 4, 6


class Sink:
    """Takes as much as it is allowed to."""

    def __init__(self) -> None:
        self._taken = bytearray()
        self.room = 1 << 20

    @property
    def taken(self) -> bytes:
        return bytes(self._taken)

    def write_nowait(self, data: bytes) -> int:
        data = data[: self.room]
        self.room -= len(data)
        self._taken += data
        return len(data)

    def accept_input(self) -> None:
        return None

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return True


class Console:
    """A device, its driver and its backend; the port is open."""

    def __init__(self) -> None:
        self.ram = memory()
        self.device = VirtioConsole(self.ram)
        self.device.sink = self.sink = Sink()
        self.transport = MmioTransport(self.device)
        self.driver = Driver(self.ram, self.transport)
        self.driver.start([INPUT, OUTPUT, CONTROL_IN, CONTROL_OUT], self.device.offered)
        self.device.resume()
        self.answers: list[tuple[int, int]] = []

    def control(self, event: int, value: int) -> list[tuple[int, int]]:
        """Say something; the (event, value) that come back."""
        places = []
        for slot in range(2):
            at = self.driver.room(8)
            self.driver.describe(CONTROL_IN, slot, at, 8, 2)
            self.driver.offer(CONTROL_IN, slot)
            places.append(at)
        self.driver.send(CONTROL_OUT, [struct.pack("<IHH", 0, event, value)], [])
        self.driver.notify(CONTROL_OUT)
        assert len(self.driver.used(CONTROL_OUT)) == 1
        told = self.driver.used(CONTROL_IN)
        return [struct.unpack("<IHH", self.ram.read(places[head], 8))[1:] for head, _ in told]


def test_the_port_is_announced_and_opened() -> None:
    console = Console()
    assert console.driver.get(0x104) == 31
    assert console.control(READY, 1) == [(ADD, 1)]


def test_what_follows_when_the_port_is_ready() -> None:
    assert Console().control(PORT_READY, 1) == [(CONSOLE, 1), (OPEN, 1)]


def test_output() -> None:
    console = Console()
    console.driver.send(OUTPUT, [b"hello, ", b"world"], [])
    console.driver.notify(OUTPUT)
    assert (console.sink.taken, console.driver.used(OUTPUT)) == (b"hello, world", [(0, 0)])


def test_output_that_the_backend_has_no_room_for_waits() -> None:
    console = Console()
    console.sink.room = 9
    console.driver.send(OUTPUT, [b"hello, ", b"world"], [])
    console.driver.notify(OUTPUT)
    assert (console.sink.taken, console.driver.used(OUTPUT)) == (b"hello, wo", [])
    console.sink.room = 100
    console.device.backend_writable()
    assert console.device.wait_idle(5)
    assert (console.sink.taken, console.driver.used(OUTPUT)) == (b"hello, world", [(0, 0)])


def test_a_huge_request_does_not_hold_the_vcpu() -> None:
    console = Console()
    console.sink.room = 1 << 30
    for slot in range(16):  # the same megabyte again and again
        console.driver.describe(OUTPUT, slot, 0x100000, 1 << 20, 1 if slot < 15 else 0, slot + 1)
    console.driver.offer(OUTPUT, 0)
    console.driver.notify(OUTPUT)
    assert console.device.wait_idle(20)
    assert (len(console.sink.taken), console.driver.used(OUTPUT)) == (16 << 20, [(0, 0)])


def test_a_request_that_is_half_out_travels_so() -> None:
    console, other = Console(), Console()
    console.sink.room = 9
    console.driver.send(OUTPUT, [b"hello, ", b"world"], [])
    console.driver.notify(OUTPUT)
    console.device.pause()
    assert console.device.wait_idle(5)
    address = 0x1000
    other.ram.write(0, console.ram.read(0, console.ram.length_bytes))
    sender = VirtioSection(console.transport, console.device, address)
    receiver = VirtioSection(other.transport, other.device, address)

    body = encode(sender.description, sender.save())
    receiver.load(decode(receiver.description, BytesSource(body), 3), 3)
    assert encode(receiver.description, receiver.save()) == body
    other.device.resume()
    assert other.device.wait_idle(5)
    other.driver.next_used = dict(console.driver.next_used)
    assert (other.sink.taken, other.driver.used(OUTPUT)) == (b"rld", [(0, 0)])


def test_input_waits_for_buffers() -> None:
    console = Console()
    console.control(OPEN, 1)
    assert console.device.wait_idle(5)
    assert console.device.can_receive() == 0
    (at,) = console.driver.send(INPUT, [], [100])
    console.driver.notify(INPUT)
    assert console.device.wait_idle(5)
    assert console.device.can_receive() == 100
    console.device.receive(b"typed")
    console.device.pause()
    assert console.device.wait_idle(5), "also when the guest is stopped: the backend has given it away"
    assert console.driver.used(INPUT) == [(0, 5)]
    assert console.ram.read(at, 5) == b"typed"
    assert console.device.can_receive() == 0


def test_ports_that_are_not_there_swallow_output() -> None:
    console = Console()
    console.driver.put(0x70, 0)
    console.driver.start([5], console.device.offered)
    console.driver.send(5, [b"lost"], [])
    console.driver.notify(5)
    assert (console.sink.taken, console.driver.used(5)) == (b"", [(0, 0)])


def test_an_emergency_is_written_without_a_ring() -> None:
    console = Console()
    console.driver.put(0x108, ord("!"))
    assert console.sink.taken == b"!"


@pytest.mark.parametrize(("asked", "given"), [(64, 64), (4096, 4096), (100_000, 4096)])
def test_random_bytes(asked: int, given: int) -> None:
    ram = memory()
    device = VirtioRng(ram)
    device.paused = False
    driver = Driver(ram, MmioTransport(device))
    driver.start([0])
    (at,) = driver.send(0, [], [asked])
    driver.notify(0)
    assert driver.used(0) == [(0, given)]
    assert ram.read(at, given).count(0) < given // 2
    assert ram.read(at + given, asked - given) == bytes(asked - given)
