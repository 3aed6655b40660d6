"""The QMP vocabulary as data: a JSON Schema (2020-12) document for each subject, read by `qmp.schema`."""

from __future__ import annotations

from importlib import resources

__all__ = ["documents"]


def documents() -> dict[str, bytes]:
    """Every document: file name -> its JSON text."""
    files = (entry for entry in resources.files(__name__).iterdir() if entry.name.endswith(".json"))
    return {entry.name: entry.read_bytes() for entry in sorted(files, key=lambda entry: entry.name)}
