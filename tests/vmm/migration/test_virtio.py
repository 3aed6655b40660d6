"""Virtio devices move: their state fits stock's layout, and loading it reads the rings, wherever they are."""

from __future__ import annotations

import pathlib
import struct

import pytest

from tests.support.real_machines import DEADLINE_S, MIB, PAGE, Side, Sides, until
from tests.support.requires import requires
from tests.support.virtio_driver import Driver
from vmm.config import DeviceConfig
from vmm.devices.virtio.transport import MmioTransport
from vmm.migration.source_hand_over import SourceHandOver
from vmm.migration.source_phases import SourcePhases

RINGS = 8 * MIB
LAST_TRANSPORT = 7
DEVICES = (DeviceConfig("virtio-rng-device"), DeviceConfig("virtio-serial-device"))


def transport(side: Side) -> MmioTransport:
    return side.machine.devices.virtio._transports[LAST_TRANSPORT]


def driver_at_work(side: Side) -> Driver:
    """A driver of the first device that has had three answers; no vCPU is needed for it."""
    driver = Driver(side.machine.ram, transport(side), base=RINGS)
    driver.start([0])
    side.machine.devices.virtio.resume()
    for _ in range(3):
        driver.send(0, [], [64])
        driver.notify(0)
    assert len(driver.used(0)) == 3
    side.machine.devices.virtio.pause()
    assert side.machine.devices.virtio.wait_idle(DEADLINE_S)
    return driver


def goes_on(source: Driver, side: Side) -> None:
    """The device serves the driver that came with RAM."""
    driver = Driver(side.machine.ram, transport(side), base=RINGS)
    driver.next_avail, driver.next_used = source.next_avail, source.next_used
    side.machine.devices.virtio.resume()
    (at,) = driver.send(0, [], [64])
    driver.notify(0)
    assert driver.used(0) == [(0, 64)]
    assert side.machine.ram.read(at, 64) != bytes(64)


def test_precopy(machines: Sides) -> None:
    source, destination = machines.pair("auditor", paused=True, devices=DEVICES)
    source.pause()
    driver = driver_at_work(source)
    source.migrator.migrate(machines.uri)
    machines.finish(source, destination)
    goes_on(driver, destination)


def test_in_postcopy_the_ring_is_asked_for_and_comes_while_the_package_loads(machines: Sides) -> None:
    requires("uffd")
    source, destination = machines.postcopy_pair("auditor", paused=True, devices=DEVICES)
    source.pause()
    driver = driver_at_work(source)
    machines.to_postcopy(source, destination)
    ring_page = driver.ring(0)[2] // PAGE
    assert destination.received.test(ring_page), "RUN comes behind the devices: the page is here"
    received = destination.migrator.query()["x-received"]
    assert received["requests"] >= 1, "it came because the device has asked for it"
    assert destination.received.count() < 16 * MIB // PAGE, "others are still at the source"
    machines.finish(source, destination)
    goes_on(driver, destination)


@pytest.mark.parametrize("how", ["cut", "cancelled"])
def test_a_device_that_waits_for_its_ring_when_the_migration_ends_keeps_nobody(
    machines: Sides, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The page never comes: the guest stays at the source, and the destination waits for the next attempt."""
    requires("uffd")
    source, destination = machines.postcopy_pair("auditor", paused=True, devices=DEVICES)
    source.pause()
    driver = driver_at_work(source)
    send = SourcePhases._serve_devices

    def end_before_sending(phases: SourcePhases) -> None:
        until(destination.migrator.waited_page, "the device has asked for its ring")
        monkeypatch.undo()
        if how == "cut":
            source.migrator.pause()
        else:
            source.migrator.cancel()
            send(phases)

    monkeypatch.setattr(SourcePhases, "_serve_devices", end_before_sending)
    source.migrator.set_parameters({"max-bandwidth": 1, "downtime-limit": 0})
    source.migrator.migrate(machines.uri)
    source.wait("active")
    source.migrator.start_postcopy()
    source.wait("failed" if how == "cut" else "cancelled")
    destination.wait("failed")
    assert "ring" not in destination.error, "it read zeroes, but that is not the reason"
    since = len(source.events), len(destination.events)
    source.migrator.set_parameters({"max-bandwidth": 0})
    source.migrator.migrate(machines.uri)
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])
    goes_on(driver, destination)


def test_a_device_that_waits_for_its_ring_gets_it_by_recovery(
    machines: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a source like stock, which has given the guest away before the package is loaded."""
    requires("uffd")
    source, destination = machines.postcopy_pair("auditor", paused=True, devices=DEVICES)
    source.pause()
    driver = driver_at_work(source)

    def cut(phases: SourcePhases) -> None:
        until(destination.migrator.waited_page, "the device has asked for its ring")
        monkeypatch.undo()
        source.migrator.pause()
        phases.send_rest()

    monkeypatch.setattr(SourceHandOver, "agree", lambda self, return_path: None)
    monkeypatch.setattr(SourcePhases, "send_rest", cut)
    source.migrator.set_parameters({"max-bandwidth": 1, "downtime-limit": 0})
    source.migrator.migrate(machines.uri)
    source.wait("active")
    source.migrator.start_postcopy()
    source.wait("postcopy-paused")
    destination.wait("postcopy-paused")
    since = len(source.events), len(destination.events)
    source.migrator.set_parameters({"max-bandwidth": 0})
    destination.migrator.recover(machines.uri + "2")
    source.migrator.migrate(machines.uri + "2", resume=True)
    source.wait("completed", since=since[0])
    destination.wait("completed", since=since[1])
    goes_on(driver, destination)


@pytest.mark.parametrize(("ring", "what"), [(1, "moved the available index"), (2, "too far apart")])
def test_rings_that_cannot_be_are_refused(machines: Sides, ring: int, what: str) -> None:
    source, destination = machines.pair("auditor", paused=True, devices=DEVICES)
    source.pause()
    driver = driver_at_work(source)
    source.machine.ram.write(driver.ring(0)[ring] + 2, struct.pack("<H", 0x8000))
    source.migrator.migrate(machines.uri)
    source.wait("failed")
    destination.wait("failed")
    assert what in destination.error


def test_another_disk_layout_is_named(machines: Sides, tmp_path: pathlib.Path) -> None:
    source = machines.make("auditor", paused=True, devices=DEVICES)
    destination = machines.make("auditor", paused=True, incoming=True, devices=DEVICES[:1])
    destination.migrator.incoming(machines.uri)
    source.migrator.migrate(machines.uri)
    source.wait("failed")
    destination.wait("failed")
    assert "virtio-mmio@00000000feb00c00/virtio-console" in destination.error
