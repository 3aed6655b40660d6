"""The QMP vocabulary as data: a JSON Schema (2020-12) document for each subject, read by `qmp.schema`."""

from __future__ import annotations

import os

__all__ = ["documents"]


def documents() -> dict[str, bytes]:
    """Every document: file name -> its JSON text."""
    # Not importlib.resources: importing that takes longer than reading the files.
    folder = os.path.dirname(__file__)
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
    return found
