"""Builds an initial RAM disk for Linux: the `newc` form of cpio, gzip-compressed.

    python -m tools.initramfs OUT busybox script     /init runs `script` under busybox's shell

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import gzip
import pathlib
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Entry", "busybox_entries", "pack"]


@dataclass(frozen=True)
class Entry:
    """One file, folder or device node; `device` is (major, minor)."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> Entry:
    """A folder."""
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> Entry:
    """An executable file."""
    return Entry(name, stat.S_IFREG | 0o755, data)


def device(name: str, major: int, minor: int) -> Entry:
    """A character device."""
    return Entry(name, stat.S_IFCHR | 0o666, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive; the same entries give the same bytes."""
    archive = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)]):
        name = entry.name.encode() + b"\0"
        fields = (number + 1, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += b"\0" * (-len(archive) % 4)
        archive += entry.data
        archive += b"\0" * (-len(archive) % 4)
    return gzip.compress(bytes(archive), 6, mtime=0)


PRELUDE = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /tmp /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
"""


def busybox_entries(busybox: bytes, script: str) -> list[Entry]:
    """A system of one static busybox; `script` goes on from where /proc, /sys and /dev are mounted."""
    return [
        *(folder(name) for name in ("bin", "dev", "proc", "sys", "tmp", "root")),
        device("dev/console", 5, 1),
        device("dev/null", 1, 3),
        program("bin/busybox", busybox),
        program("init", (PRELUDE + script).encode()),
    ]


def main(out: str, busybox: str, script: str) -> None:
    """The command."""
    entries = busybox_entries(pathlib.Path(busybox).read_bytes(), pathlib.Path(script).read_text())
    pathlib.Path(out).write_bytes(pack(entries))


if __name__ == "__main__":
    main(*sys.argv[1:4])
