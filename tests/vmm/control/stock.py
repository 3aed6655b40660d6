"""A stock QEMU with no machine, and a connection to its QMP."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

SYNC = b'\xff{"execute":"query-name","id":"SYNC"}\n'
"""Brings any QMP server back to a known state, and shows where the replies to what came before end."""


class Stock:
    """The process is ended by `close`."""

    def __init__(self, directory: Path) -> None:
        address = str(directory / "stock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(60)
        self._process = subprocess.Popen(
            ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{address}"]
        )
        self._socket, _ = self._listener.accept()
        self._socket.settimeout(60)
        self._file = self._socket.makefile("rb")
        self._file.readline()

    def say(self, data: bytes) -> list[dict[str, Any]]:
        """What is answered to these bytes."""
        self._socket.sendall(data + SYNC)
        replies: list[dict[str, Any]] = []
        while True:
            reply = json.loads(self._file.readline())
            if reply.get("id") == "SYNC":
                return replies
            replies.append(reply)

    def close(self) -> None:
        """End it."""
        self._file.close()
        self._socket.close()
        self._listener.close()
        self._process.kill()
        self._process.wait()
