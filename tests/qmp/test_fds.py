"""Passed descriptors: owned, bounded, closed."""

from __future__ import annotations

import os

import pytest

from qmp.errors import GenericError
from qmp.fds import MAX_NAMED_FDS, FdStore


def new_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_life_of_a_descriptor() -> None:
    store = FdStore()
    replaced, named, extra = new_fd(), new_fd(), new_fd()
    store.receive([replaced])
    store.receive([])
    store.receive([named, extra])
    assert not is_open(replaced)
    store.name_received("a")
    assert store.take("a") == named
    with pytest.raises(GenericError, match="File descriptor named 'a' has not been found"):
        store.take("a")
    store.close()
    assert not is_open(extra)
    assert is_open(named)
    os.close(named)


def test_same_name_and_closefd() -> None:
    store = FdStore()
    first, second = new_fd(), new_fd()
    for fd in (first, second):
        store.receive([fd])
        store.name_received("a")
    assert not is_open(first)
    store.close_named("a")
    assert not is_open(second)
    with pytest.raises(GenericError, match="File descriptor named 'a' not found"):
        store.close_named("a")


def test_refusals_close_what_came() -> None:
    store = FdStore()
    with pytest.raises(GenericError, match="No file descriptor supplied via SCM_RIGHTS"):
        store.name_received("a")
    digit = new_fd()
    store.receive([digit])
    with pytest.raises(GenericError, match="Parameter 'fdname' expects a name not starting with a digit"):
        store.name_received("1a")
    assert not is_open(digit)
    for number in range(MAX_NAMED_FDS):
        store.receive([new_fd()])
        store.name_received(f"n{number}")
    surplus = new_fd()
    store.receive([surplus])
    with pytest.raises(GenericError, match="Too many file descriptors"):
        store.name_received("one-more")
    assert not is_open(surplus)
    store.close()
