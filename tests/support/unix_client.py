"""Connects to a unix socket of a process that may still be coming up."""

from __future__ import annotations

import pathlib
import socket
import time

__all__ = ["connected"]

POLL_S = 0.005


def connected(path: pathlib.Path, timeout_s: float = 60.0) -> socket.socket:
    """A connection, as soon as somebody listens; its calls give up after `timeout_s`. Raises OSError."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            is_early = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            if not is_early or time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_S)
        else:
            return sock
