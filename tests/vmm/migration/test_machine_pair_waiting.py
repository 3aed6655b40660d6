"""Pages that a destination needs before it can go on: nothing waits for what waits for it.

The source is throttled to next to nothing, so that every page but a few comes on request.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from tests.support.real_machines import MIB, PAGE, Side, Sides, until
from tests.support.requires import requires
from tools.guest_checks import audit
from vmm.migration.attempt import Attempt
from vmm.migration.loader import Loader
from vmm.ram import PageNotReceived, RamKind

ROOT = pathlib.Path(__file__).resolve().parents[3]
KINDS = [RamKind.ANONYMOUS, RamKind.MEMFD_SHARED, RamKind.MEMFD_PRIVATE]
CHILD_DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _needs_userfaultfd() -> None:
    requires("uffd")


def requested(source: Side) -> int:
    return int(source.migrator.query()["x-postcopy"]["requested-pages"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_instruction_needs_missing_pages(machines: Sides, kind: RamKind) -> None:
    """Page tables, GDT, TSS, stack and code lie at 24 MiB, far beyond what has been sent."""
    source, destination = machines.postcopy_pair("longmode", "pages=64 beat=16", memory=36 * MIB, kind=kind)
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_bandwidth=1, max_postcopy_bandwidth=1)
    first_needed = source.machine.engine.get_cpu_state()["env.eip"] & 0xFFFFFFFF
    destination.wait_heartbeat(3)
    assert source.status == "postcopy-active", "the pages were not sent on request"
    until(lambda: requested(source) > 64, "the statistics")  # the working set, and what the CPU itself needs
    assert destination.received.test(first_needed // PAGE)
    assert destination.received.find_next_clear(0) is not None
    machines.finish(source, destination)
    destination.wait_heartbeat(2)
    assert destination.verdict(source).is_good, destination.verdict(source)


def test_cpu_state_load_and_stop_while_the_vcpu_waits_for_its_first_page(machines: Sides) -> None:
    """A stop of a vCPU that is parked on a page returns, and is acknowledged when the page is there."""
    source, destination = machines.postcopy_pair(
        "longmode", "pages=64 beat=16", memory=36 * MIB, fault="drop-request"
    )
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_bandwidth=1, max_postcopy_bandwidth=1)
    deadline_s = time.monotonic() + 20
    while not destination.migrator.query()["x-received"]["requests"]:  # the vCPU may not have begun yet
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert destination.machine.stop(wait_s=0.3) is False, "the vCPU was to wait for a page that never comes"
    assert destination.machine.run_state.value == "paused"
    assert destination.values("STOP") == [None]
    source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
    destination.wait("postcopy-paused")
    assert destination.machine.stop(wait_s=0.05) is False
    destination.heal()  # zeroes in its code, but the vCPU has a page again
    assert destination.machine.stop(wait_s=10) is True


def test_users_get_an_error_for_a_missing_page(machines: Sides) -> None:
    source, destination = machines.postcopy_pair(append="pages=512 beat=4")
    source.wait_heartbeat()
    machines.to_postcopy(source, destination, max_bandwidth=1, max_postcopy_bandwidth=1)
    last = destination.machine.ram.length_bytes - PAGE
    with pytest.raises(PageNotReceived, match="have not all been received"):
        destination.machine.ram.read(last, PAGE)
    machines.finish(source, destination)
    assert destination.machine.ram.read(last, PAGE) == bytes(PAGE)
    destination.wait_heartbeat()
    assert destination.verdict(source).is_good, destination.verdict(source)


def read_in_time(side: Side, offset: int) -> bytes | BaseException:
    """A page of RAM as a user reads it: on a thread of its own, which must not wait."""
    results: list[bytes | BaseException] = []

    def read() -> None:
        try:
            results.append(side.machine.ram.read(offset, PAGE))
        except PageNotReceived as error:
            results.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(2)
    assert results, "a user waits for a page that nobody serves"
    return results[0]


def test_users_read_while_the_source_waits_before_the_switchover(machines: Sides) -> None:
    """Pages of zeroes are received and absent: nobody serves a fault on one before LISTEN."""
    source, destination = machines.postcopy_pair(append="pages=512 beat=4")
    source.capability("pause-before-switchover")
    source.wait_heartbeat()
    last = destination.machine.ram.length_bytes - PAGE
    source.migrator.set_parameters({"downtime-limit": 0, "max-bandwidth": 8 * MIB})  # no end of precopy
    source.migrator.migrate(machines.uri)
    source.wait("active")
    until(lambda: destination.received.test(last // PAGE), "the first pass")
    source.migrator.start_postcopy()
    source.wait("pre-switchover")
    assert read_in_time(destination, last) == bytes(PAGE)
    source.migrator.continue_("pre-switchover")
    machines.finish(source, destination)
    destination.wait_heartbeat()
    assert destination.verdict(source).is_good, destination.verdict(source)


def test_users_never_wait_for_a_destination_that_is_armed(
    machines: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for some ms, or for as long as the wire takes to bring the package."""
    source, destination = machines.postcopy_pair(append="pages=512 beat=4")
    source.wait_heartbeat()
    last = destination.machine.ram.length_bytes - PAGE
    armed, read = threading.Event(), threading.Event()
    real = Attempt.arm

    def arm(self: Attempt, loader: Loader) -> None:
        real(self, loader)
        armed.set()
        read.wait(20)

    monkeypatch.setattr(Attempt, "arm", arm)
    source.migrator.set_parameters({"downtime-limit": 0, "max-bandwidth": 8 * MIB})  # no end of precopy
    source.migrator.migrate(machines.uri)
    source.wait("active")
    until(lambda: destination.received.test(last // PAGE), "the first pass")
    source.migrator.start_postcopy()
    try:
        assert armed.wait(20)
        assert isinstance(read_in_time(destination, last), PageNotReceived)
    finally:
        read.set()
    machines.finish(source, destination)
    assert read_in_time(destination, last) == bytes(PAGE)
    destination.wait_heartbeat()
    assert destination.verdict(source).is_good, destination.verdict(source)


@pytest.mark.parametrize("way", ["threads", "held"])
def test_python_never_holds_the_gil_on_the_way_of_a_page(machines: Sides, way: str) -> None:
    """Would hang, and be killed at the deadline, if a fault, a request or a page needed the GIL."""
    memory, append = 16 * MIB, "pages=256 beat=8"
    source = machines.make("auditor", append, memory=memory)
    source.capability("postcopy-ram")
    source.wait_heartbeat()
    wanted = memory - PAGE
    secret = hashlib.sha512(b"nothing else has these bytes").digest() * (PAGE // 64)
    source.machine.ram.write(wanted, secret)
    arguments = [machines.uri, "auditor", append, str(memory), way, str(wanted)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.held_gil", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "listening\n"
            source.migrator.set_parameters({"max-bandwidth": 1, "max-postcopy-bandwidth": 1})
            source.migrator.migrate(machines.uri)
            source.wait("active")
            source.migrator.start_postcopy()
            source.wait("postcopy-active")
            # The page's own request brings it: the linear scan is stopped until the answer is here.
            line = Timed(child).readline()
            assert line == f"missing {hashlib.sha256(secret).hexdigest()}\n"
            source.migrator.set_parameters({"max-postcopy-bandwidth": 0})
            source.wait("completed")
            output, _ = child.communicate(timeout=CHILD_DEADLINE_S)
            assert child.returncode == 0, output
            # The hand-over may cut a line in two: both outputs together are what the guest said.
            verdict = audit(source.serial.text, json.loads(output))
            assert verdict.is_good, verdict
        finally:
            child.kill()


class Timed:
    """Reads a child's output; a child that says nothing for too long is killed, and the read then ends."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def readline(self) -> str:
        import threading

        timer = threading.Timer(CHILD_DEADLINE_S, self._child.kill)
        timer.start()
        try:
            assert self._child.stdout is not None
            return self._child.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
