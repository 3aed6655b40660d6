"""What QMP clients may say and hear, before there is anything to talk of: monitors open with this alone.

Importing the machine and the migration stack takes longer than all else at the start. A client that is
greeted meanwhile has negotiated by the time its first command can be executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import schema
from qmp.dispatcher import Dispatcher
from qmp.events import EventHub
from qmp.schema import Schema
from vmm.control.refusals import refusal_text

__all__ = ["BANNER", "VERSION", "Vocabulary", "make_vocabulary"]

VERSION: Final[dict[str, Any]] = {
    "qemu": {"micro": 22, "minor": 2, "major": 7},
    "package": "pageferry-0.1.0",
}
"""The QEMU whose commands, events and stream are spoken, and our own name."""

BANNER: Final = "QEMU {major}.{minor}.{micro} monitor - type 'help' for more information\r\n".format(
    **VERSION["qemu"]
)
"""What a human monitor shows first: scripts wait for it."""


@dataclass(frozen=True)
class Vocabulary:
    """A dispatcher that has no handlers yet, and the hub of the events."""

    dispatcher: Dispatcher
    hub: EventHub
    hide_unstable: bool


def make_vocabulary(*, hide_unstable: bool = False) -> Vocabulary:
    """Read the schema. `hide_unstable` is `-compat unstable-output=hide`."""
    documents = Schema(schema.documents())
    dispatcher = Dispatcher(documents, VERSION, hide_unstable=hide_unstable, explain=refusal_text)
    return Vocabulary(dispatcher, EventHub(documents, hide_unstable=hide_unstable), hide_unstable)
