"""Where the source of a broken migration comes back: opened by migrate-recover, closed when it is through.

A stranger, or a handshake that breaks, changes nothing: the next one is welcome. Who says nothing for
HANDSHAKE_MS is turned away. Source: QEMU 7.2 migration/migration.c (qmp_migrate_recover), which takes one
connection, whatever it is.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from vmm.errors import PageferryError
from vmm.migration.byte_stream import StreamReader
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled, NotAMigrationStream, PeerError, reason
from vmm.migration.wire import RecordType

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.channel import Channel, Incoming

__all__ = ["HANDSHAKE_MS", "RecoveryDoor", "is_question"]

log = logging.getLogger(__name__)

HANDSHAKE_MS = 10_000
"""Arbitrary: a source speaks first, and at once."""


def is_question(channel: Channel) -> bool:
    """Does the source begin with a command, not with a stream? Nothing is taken from the channel."""
    return channel.peek(1) == bytes([RecordType.COMMAND])


class RecoveryDoor:
    """Accepts at `incoming` until `serve` says that it is enough. Owns the thread mig/recover.

    `serve` gets a channel that is its own from then on, and the reader on it.
    """

    def __init__(self, incoming: Incoming, serve: Callable[[Channel, StreamReader], bool]) -> None:
        self._incoming = incoming
        self._serve = serve
        self._cancel = CancelEvent()
        self._thread = threading.Thread(target=self._main, name="mig/recover")
        self._thread.start()

    @property
    def address(self) -> dict[str, object] | None:
        """Where it is, for query-migrate's `socket-address`; None once it is closed."""
        return self._incoming.address if self._thread.is_alive() else None

    def close(self, timeout_s: float) -> bool:
        """Let nobody in any more; False if the thread did not end in time."""
        self._cancel.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            while not self._serve_next() and self._incoming.again:
                pass
        except Cancelled:
            log.info("mig/recover: closed")
        except OSError:
            log.exception("mig/recover cannot accept")
        finally:
            self._incoming.close()

    def _serve_next(self) -> bool:
        channel = self._incoming.accept(self._cancel.fd)
        reader = StreamReader(channel.read_fd, self._cancel.fd, HANDSHAKE_MS)
        try:
            if not channel.two_way:
                raise PeerError(f"Recovery needs a two-way transport, and {channel.name} is one-way")
            first = reader.peek(1)
            if first != bytes([RecordType.COMMAND]):
                raise NotAMigrationStream("Recovery", expected="a command", got=first.hex() or "nothing")
        except Cancelled:
            channel.close()
            raise
        except (PageferryError, OSError) as error:
            log.warning("turned away at the recovery's address: %s", reason(error))
            channel.close()
            return False
        reader.struct.timeout_ms = -1
        return self._serve(channel, reader)
