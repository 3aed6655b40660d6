"""Name resolution that can be cancelled: getaddrinfo on a thread, since nothing ends it from outside.

A thread whose answer nobody wants any more ends when the name servers have answered, or have not for long
enough (resolv.conf(5): 5 s a try and server by default); the process does not wait for it.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

from vmm.migration.cancel import KickEvent
from vmm.migration.page_pump.native import wait_fd

__all__ = ["AddressInfo", "resolve"]

AddressInfo = list[tuple[int, int, int, str, Any]]
"""What getaddrinfo gives."""


def resolve(host: str | None, port: str | int, family: int, cancel_fd: int) -> AddressInfo:
    """The addresses of `host` for a TCP socket; None: of any interface.

    Raises:
        OSError, UnicodeError: there is none, or it is no name.
        Cancelled: `cancel_fd` became readable.
    """
    try:
        flags = socket.AI_NUMERICHOST
        return list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=flags))
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise
    question = _Question(host, port, family)
    wait_fd(question.answered.fd, cancel_fd)
    if question.error is not None:
        raise question.error
    return question.answer


class _Question:
    """Asks in the background."""

    def __init__(self, host: str | None, port: str | int, family: int) -> None:
        self._arguments = host, port, family
        self.answered = KickEvent()
        self.answer: AddressInfo = []
        self.error: Exception | None = None
        threading.Thread(target=self._ask, name="mig/resolve", daemon=True).start()

    def _ask(self) -> None:
        try:
            host, port, family = self._arguments
            self.answer = list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            self.error = error
        self.answered.kick()
