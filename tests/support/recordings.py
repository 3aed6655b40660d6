"""Recorded streams of stock QEMU 7.2.22 (tests/fixtures/streams), so that decoders are tested without it."""

from __future__ import annotations

import functools
import lzma
import pathlib

__all__ = ["NAMES", "PRECOPY", "recording"]

FOLDER = pathlib.Path(__file__).parent.parent / "fixtures" / "streams"
NAMES = sorted(path.stem for path in FOLDER.glob("*.xz"))
PRECOPY = [name for name in NAMES if "postcopy" not in name]
"""Those that carry a vmdescription."""


@functools.cache
def recording(name: str) -> bytes:
    """The stream as it was on the wire."""
    return lzma.decompress((FOLDER / f"{name}.xz").read_bytes())
