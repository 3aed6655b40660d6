"""Who is let in, and when: by what it has said, not by when it came."""

from __future__ import annotations

import pathlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled
from vmm.migration.lobby import MOST_WAITING, Lobby, is_introduced

HEADER = b"QEVM\0\0\0\3"
WHOLE = HEADER + b"\7\0\0\0\7microvm"


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_a_source_is_introduced_by_its_configuration(length: int) -> None:
    assert not is_introduced(WHOLE[:length])
    assert is_introduced(WHOLE)


@given(st.binary(min_size=1, max_size=600))
def test_whatever_is_no_beginning_of_a_stream_is_judged_at_once(head: bytes) -> None:
    if not WHOLE.startswith(head[: len(HEADER)]):
        assert is_introduced(head)


@given(st.binary(max_size=600))
def test_whatever_follows_a_header_some_more_bytes_are_enough(rest: bytes) -> None:
    """No peer can ask for more patience than for a few hundred bytes."""
    assert is_introduced((HEADER + rest).ljust(512, b"\0"))


@pytest.mark.parametrize("head", [HEADER + b"\1", HEADER + b"\0", b"\x08\0\x01", b"QEVM\0\0\0\2", b"GET "])
def test_other_beginnings(head: bytes) -> None:
    """Without a configuration, as old machine types; a source that recovers; strangers."""
    assert is_introduced(head)


class Door:
    def __init__(self, path: str) -> None:
        self.path = path
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(MOST_WAITING + 10)
        listener.setblocking(False)
        self.limit_ms = 0
        self.lobby = Lobby(listener, lambda: self.limit_ms)
        self.cancel = CancelEvent()
        self.peers: list[socket.socket] = []

    def come(self, words: bytes = b"") -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(60)
        peer.connect(self.path)
        peer.sendall(words)
        self.peers.append(peer)
        return peer

    def admitted(self) -> bytes:
        """What the next one that is let in has said."""
        with self.lobby.admit(self.cancel.fd) as peer:
            return peer.recv(1000)


@pytest.fixture
def door(tmp_path: pathlib.Path) -> Iterator[Door]:
    made = Door(str(tmp_path / "door"))
    yield made
    made.lobby.close()
    for peer in made.peers:
        peer.close()


def test_who_speaks_is_served_before_who_came(door: Door) -> None:
    slow = door.come(WHOLE[:10])
    door.come()
    door.come(b"GET /")
    assert door.admitted() == b"GET /"
    slow.sendall(WHOLE[10:])
    assert door.admitted() == WHOLE


def test_who_closes_after_too_few_words_is_served(door: Door) -> None:
    """So that mig/load says what was wrong."""
    door.come(WHOLE[:10]).shutdown(socket.SHUT_WR)
    assert door.admitted() == WHOLE[:10]
    door.come().shutdown(socket.SHUT_WR)
    assert door.admitted() == b""


def test_the_silent_are_turned_away(door: Door) -> None:
    door.limit_ms = 50
    silent = door.come(WHOLE[:10])
    threading.Timer(0.3, door.cancel.set).start()
    with pytest.raises(Cancelled):
        door.lobby.admit(door.cancel.fd)
    with pytest.raises(ConnectionResetError):
        silent.recv(1)


def test_the_one_that_has_been_silent_for_longest_makes_room(door: Door) -> None:
    peers = [door.come() for _ in range(MOST_WAITING + 2)]
    door.come(WHOLE)
    assert door.admitted() == WHOLE
    assert [peer.recv(1) for peer in peers[:3]] == [b""] * 3
    peers[3].sendall(WHOLE)
    assert door.admitted() == WHOLE
