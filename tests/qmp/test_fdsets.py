"""Sets of descriptors: QEMU's numbers and texts, bounded, closed with the last client."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmp.errors import GenericError
from qmp.fds import FdStore
from qmp.fdsets import MAX_SET_FDS, FdSets


def new_fd(flags: int = os.O_RDONLY) -> int:
    return os.open("/dev/null", flags)


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


@pytest.fixture
def sets() -> FdSets:
    return FdSets()


def test_numbers_and_listing(sets: FdSets) -> None:
    """The sequence and its replies were recorded from QEMU 7.2."""
    store = FdStore(sets)
    fds = [new_fd() for _ in range(6)]
    calls = [(None, None), (None, "x"), (0, "rdwr:/a"), (7, None), (5, ""), (None, None)]
    numbers = [sets.add(fd, *call)["fdset-id"] for fd, call in zip(fds, calls, strict=True)]
    assert numbers == [0, 1, 0, 7, 5, 2]
    assert sets.describe() == [
        {"fdset-id": 7, "fds": [{"fd": fds[3]}]},
        {"fdset-id": 5, "fds": [{"fd": fds[4], "opaque": ""}]},
        {"fdset-id": 2, "fds": [{"fd": fds[5]}]},
        {"fdset-id": 1, "fds": [{"fd": fds[1], "opaque": "x"}]},
        {"fdset-id": 0, "fds": [{"fd": fds[0]}, {"fd": fds[2], "opaque": "rdwr:/a"}]},
    ]
    sets.remove(0, fds[0])
    sets.remove(5)
    assert [is_open(fd) for fd in fds] == [False, True, True, True, False, True]
    assert [each["fdset-id"] for each in sets.describe()] == [7, 2, 1, 0]
    store.close()
    assert not any(map(is_open, fds))
    assert sets.describe() == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((9,), "File descriptor named 'fdset-id:9' not found"),
        ((-3,), "File descriptor named 'fdset-id:-3' not found"),
        ((0, 999), "File descriptor named 'fdset-id:0, fd:999' not found"),
    ],
)
def test_what_is_not_there(sets: FdSets, arguments: tuple[int, ...], text: str) -> None:
    store = FdStore(sets)
    sets.add(new_fd())
    with pytest.raises(GenericError, match=text):
        sets.remove(*arguments)
    store.close()


def test_what_cannot_be_added_is_closed(sets: FdSets) -> None:
    store = FdStore(sets)
    negative = new_fd()
    with pytest.raises(GenericError, match="Parameter 'fdset-id' expects a non-negative value"):
        sets.add(negative, -1)
    assert not is_open(negative)
    for _ in range(MAX_SET_FDS):
        sets.add(new_fd(), 3)
    surplus = new_fd()
    with pytest.raises(GenericError, match="Too many file descriptors"):
        sets.add(surplus)
    assert not is_open(surplus)
    store.close()


def test_the_last_client_closes_them(sets: FdSets) -> None:
    first, second = FdStore(sets), FdStore(sets)
    fd = sets.add(new_fd())["fd"]
    first.close()
    first.close()
    assert is_open(fd)
    second.close()
    assert not is_open(fd)


def test_paths(sets: FdSets, tmp_path: Path) -> None:
    store = FdStore(sets)
    (tmp_path / "file").write_text("")
    sets.add(os.open(tmp_path / "file", os.O_RDONLY), 4)
    sets.add(os.open(tmp_path / "file", os.O_WRONLY), 4)
    with open(sets.resolve("/dev/fdset/4", os.O_WRONLY), "w") as file:
        file.write("hello")
    assert Path(sets.resolve("/dev/fdset/4", os.O_RDONLY)).read_text() == "hello"
    assert sets.resolve("/dev/fdset/x", os.O_RDONLY) == "/dev/fdset/x"
    with pytest.raises(PermissionError):
        sets.resolve("/dev/fdset/4", os.O_RDWR)
    with pytest.raises(FileNotFoundError):
        sets.resolve("/dev/fdset/5", os.O_RDONLY)
    store.close()
