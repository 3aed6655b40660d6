"""virtio-blk: requests against a file that the test reads itself."""

from __future__ import annotations

import io
import os
import pathlib
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.virtio_driver import Driver, memory
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.device import RING_FEATURES
from vmm.devices.virtio.disk import RawDisk
from vmm.devices.virtio.element import ELEMENT_BYTES
from vmm.devices.virtio.transport import MmioTransport
from vmm.errors import DeviceError

SECTOR = 512
SECTORS = 256
OK, IOERR, UNSUPP = 0, 1, 2
IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13


class Disk:
    """A device with its driver."""

    def __init__(self, path: pathlib.Path, *, read_only: bool = False, features: int | None = None) -> None:
        self.path = path
        self.ram = memory()
        self.device = VirtioBlock(self.ram, RawDisk(str(path), read_only=read_only), "S-123")
        self.driver = Driver(self.ram, MmioTransport(self.device))
        self.driver.start([0], self.device.offered if features is None else features)
        self.device.resume()

    def request(
        self, kind: int, sector: int, data: list[bytes] | None = None, room: int = 0
    ) -> tuple[int, bytes]:
        """Status and what was read."""
        header = struct.pack("<IIQ", kind, 0, sector)
        writable = [room, 1] if room else [1]
        places = self.driver.send(0, [header, *(data or [])], writable)
        self.driver.notify(0)
        assert self.device.wait_idle(10)
        ((_, length),) = self.driver.used(0)
        status = self.ram.read(places[-1], 1)[0]
        assert length == 1 + (room if status == OK and kind == IN else length - 1)
        return status, self.ram.read(places[0], room) if room else b""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([number % 256]) * SECTOR for number in range(SECTORS)))
    return path


@pytest.fixture
def disk(path: pathlib.Path) -> Iterator[Disk]:
    made = Disk(path)
    yield made
    assert made.device.close(5)
    made.device.disk.close()


def test_the_configuration_says_what_the_disk_is(disk: Disk) -> None:
    assert disk.driver.get(0x100, 4) == SECTORS
    assert len(disk.device.config()) == 57, "as in QEMU 7.2"
    assert disk.driver.get(0x100 + 20, 4) == SECTOR


def test_reads_and_writes(disk: Disk) -> None:
    assert disk.request(IN, 7, room=2 * SECTOR) == (OK, b"\7" * SECTOR + b"\10" * SECTOR)
    assert disk.request(OUT, 9, [b"a" * SECTOR, b"b" * SECTOR]) == (OK, b"")
    assert disk.path.read_bytes()[9 * SECTOR : 11 * SECTOR] == b"a" * SECTOR + b"b" * SECTOR
    assert disk.request(FLUSH, 0) == (OK, b"")
    assert disk.request(GET_ID, 0, room=20) == (OK, b"S-123".ljust(20, b"\0"))


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (IN, SECTORS, [], SECTOR, IOERR),
        (IN, SECTORS - 1, [], 2 * SECTOR, IOERR),
        (IN, (1 << 64) - 1, [], SECTOR, IOERR),
        (IN, 0, [], SECTOR + 1, IOERR),
        (OUT, SECTORS, [b"a" * SECTOR], 0, IOERR),
        (OUT, 0, [b"a" * 100], 0, IOERR),
        (99, 0, [], 0, UNSUPP),
        (ZEROES, 0, [struct.pack("<QII", 0, 1, 2)], 0, UNSUPP),
        (ZEROES, 0, [struct.pack("<QII", SECTORS, 1, 0)], 0, IOERR),
        (ZEROES, 0, [bytes(15)], 0, IOERR),
        (DISCARD, 0, [bytes(32)], 0, UNSUPP),
        (DISCARD, 0, [struct.pack("<QII", 3, 4, 0)], 0, OK),
    ],
)
def test_what_cannot_be_done_has_a_status(
    disk: Disk, kind: int, sector: int, data: list[bytes], room: int, status: int
) -> None:
    before = disk.path.read_bytes()
    assert disk.request(kind, sector, data, room)[0] == status
    assert disk.path.read_bytes() == before
    assert not disk.device.broken


def test_what_waits_when_the_guest_stops_travels_as_begun(disk: Disk) -> None:
    disk.device.pause()
    header = struct.pack("<IIQ", IN, 0, 7)
    place, _ = disk.driver.send(0, [header], [SECTOR, 1])
    disk.driver.notify(0)
    assert disk.device.wait_idle(10)
    disk.device.begin_all()
    assert disk.device.queues[0].last_avail == 1
    state = disk.device.save_own()
    assert len(state) == 1 + ELEMENT_BYTES + 1
    disk.device.load_own(io.BytesIO(state).read)
    disk.device.resume()
    assert disk.device.wait_idle(10)
    assert len(disk.driver.used(0)) == 1
    assert disk.ram.read(place, SECTOR) == b"\7" * SECTOR


def test_zeroes(disk: Disk) -> None:
    assert disk.request(ZEROES, 0, [struct.pack("<QII", 3, 2, 1)])[0] == OK
    assert (
        disk.path.read_bytes()[2 * SECTOR : 6 * SECTOR] == b"\2" * SECTOR + bytes(2 * SECTOR) + b"\5" * SECTOR
    )


def test_a_read_only_disk_is_not_written(path: pathlib.Path) -> None:
    disk = Disk(path, read_only=True)
    assert disk.device.offered & 1 << 5
    for kind, data in ((OUT, b"a" * SECTOR), (ZEROES, struct.pack("<QII", 0, 1, 0))):
        assert disk.request(kind, 0, [data])[0] == IOERR
    assert disk.request(IN, 1, room=SECTOR) == (OK, b"\1" * SECTOR)
    assert disk.device.close(5)


def test_without_a_write_cache_each_write_is_flushed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    disk.request(OUT, 0, [b"a" * SECTOR])
    assert flushed == []
    disk.driver.put(0x100 + 32, 0, 1)
    assert disk.driver.get(0x100 + 32, 1) == 0
    disk.request(OUT, 0, [b"a" * SECTOR])
    assert len(flushed) == 1


def test_an_error_of_the_host_is_the_guests_to_deal_with(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert disk.request(IN, 0, room=SECTOR)[0] == IOERR


@pytest.mark.parametrize("readable", [[], [b"short"]])
def test_a_request_without_a_header_breaks_the_device(disk: Disk, readable: list[bytes]) -> None:
    disk.driver.send(0, readable, [1])
    disk.driver.notify(0)
    assert disk.device.wait_idle(5)
    assert disk.device.broken


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, SECTORS - 4), st.integers(1, 4), st.integers(0, 255)),
        max_size=20,
    )
)
def test_a_disk_is_a_disk(disk: Disk, steps: list[tuple[bool, int, int, int]]) -> None:
    model = bytearray(disk.path.read_bytes())
    for writes, sector, count, byte in steps:
        where = slice(sector * SECTOR, (sector + count) * SECTOR)
        if writes:
            model[where] = bytes([byte]) * count * SECTOR
            assert disk.request(OUT, sector, [bytes(model[where])])[0] == OK
        else:
            assert disk.request(IN, sector, room=count * SECTOR) == (OK, bytes(model[where]))
    assert disk.path.read_bytes() == bytes(model)


def test_features_that_were_not_offered_are_refused(path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match="the features were refused"):
        Disk(path, features=RING_FEATURES | 1 << 50)


@pytest.mark.parametrize("name", ["missing.img", "."])
def test_a_file_that_is_no_disk(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(DeviceError, match="Could not open"):
        RawDisk(str(tmp_path / name), read_only=True)
