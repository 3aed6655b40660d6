"""Which connections of a source are the main stream and which are multifd channels: they come in any order.

A multifd channel begins with its own magic; the first one that does not is the main stream.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
from typing import TYPE_CHECKING

from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled, PeerError
from vmm.migration.multifd_wire import MAGIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.migration.channel import Channel

__all__ = ["gather"]

log = logging.getLogger(__name__)

_MULTIFD = MAGIC.to_bytes(4, "big")


def gather(
    first: Channel, accept: Callable[[int], Channel], count: int, cancel_fd: int, limit_ms: int
) -> Channel:
    """The main stream's channel with `count` others in its `more`.

    Raises:
        PeerError: they did not all come within `limit_ms` (0: there is no limit).
        Cancelled, OSError: as `accept`. Everything that has come is closed then.
    """
    main: Channel | None = None
    others: list[Channel] = []
    try:
        with _deadline(cancel_fd, limit_ms) as (fd, has_passed):
            channel: Channel | None = first
            while main is None or len(others) < count:
                try:
                    channel = channel or accept(fd)
                except Cancelled:
                    if not has_passed():
                        raise
                    text = f"{len(others)} of {count} multifd channels have come in time"
                    raise PeerError(text if main else f"{text}, and no main stream") from None
                begin = channel.peek(4)  # the lobby has let it in because it has said something
                if begin == _MULTIFD and len(others) < count:
                    others.append(channel)
                elif begin != _MULTIFD and main is None:
                    main = channel
                else:
                    log.warning("a connection too many was turned away")
                    channel.close()
                channel = None
    except BaseException:
        for each in (*others, *([main] if main else [])):
            each.close()
        raise
    main.more = others
    return main


@contextlib.contextmanager
def _deadline(cancel_fd: int, limit_ms: int) -> Iterator[tuple[int, Callable[[], bool]]]:
    """A descriptor that becomes readable with `cancel_fd`, or when the time has passed; has it?"""
    over = CancelEvent()
    timer = threading.Timer(limit_ms / 1000, over.set)
    try:
        with select.epoll() as either:
            either.register(cancel_fd, select.EPOLLIN)
            either.register(over.fd, select.EPOLLIN)
            if limit_ms:
                timer.start()
            yield either.fileno(), lambda: over.is_set
    finally:
        timer.cancel()
        if limit_ms:
            timer.join()
        over.close()
