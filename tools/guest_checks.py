"""Judges a guest from outside: the dirtier by its memory, the others by what they say.

Nothing here touches a machine: bytes and text go in, a verdict comes out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PAGE_BYTES = 4096
DIRTIER_START = 0x100000
DIRTIER_END = 0x6400000
"""The range of the boot sector, and what the ELF one takes without parameters."""

_HEARTBEAT = re.compile(r"^[HL] ([0-9a-f]+)$")
_ERROR_COUNT = re.compile(r"^E ([0-9a-f]+)$")
_COMPLAINT = re.compile(r"^(LOST|STALE|TORN|REG|X) ")


class GuestCheckError(AssertionError):
    """The guest's memory is not what a guest that ran undisturbed can have."""


def check_dirtier(first_bytes: bytes) -> int:
    """Judge a stopped dirtier by the first byte of each page of its range, walking upward.

    All are equal, except that they may drop once by one (modulo 256) where the guest stands. Returns the
    index of the page where they drop, or the number of pages. Raises GuestCheckError with the page.
    """
    if not first_bytes:
        raise GuestCheckError("No page to check")
    counter, drop = first_bytes[0], len(first_bytes)
    for page, value in enumerate(first_bytes):
        if value == counter:
            continue
        if drop == len(first_bytes) and value == (counter - 1) % 256:
            counter, drop = value, page
            continue
        where = "" if drop == len(first_bytes) else f" and dropped once already, at page {drop}"
        raise GuestCheckError(f"Page {page} has {value:#04x}; the pages before it have {counter:#04x}{where}")
    return drop


def dirtier_first_bytes(memory: bytes) -> bytes:
    """The first byte of each page of `memory`, which begins at a page."""
    return memory[::PAGE_BYTES]


@dataclass(frozen=True)
class Verdict:
    """What an auditor or long mode guest said."""

    rounds: int
    """The last round that it reported."""
    heartbeats: int
    went_backwards: bool
    """True if a heartbeat did not continue the one before: a part of the guest's life ran twice."""
    complaints: tuple[str, ...] = field(default=())
    """Its LOST, STALE, TORN, REG and X lines, in order."""
    strange: tuple[str, ...] = field(default=())
    """Lines that the guest never writes: characters were lost or came twice."""
    error_count: int = 0

    @property
    def is_good(self) -> bool:
        """True if the guest lived, never complained, and its words arrived whole."""
        alive = self.heartbeats > 0
        return alive and not (self.complaints or self.strange or self.error_count or self.went_backwards)


def audit(*outputs: str) -> Verdict:
    """Read the serial output of an auditor or long mode guest, in the order of the machines it ran on."""
    rounds, heartbeats, errors, backwards = 0, 0, 0, False
    complaints: list[str] = []
    strange: list[str] = []
    whole_lines = "".join(outputs).split("\n")[:-1]
    for line in (text.rstrip("\r") for text in whole_lines):
        if match := _HEARTBEAT.match(line):
            backwards |= int(match[1], 16) <= rounds
            rounds, heartbeats = int(match[1], 16), heartbeats + 1
        elif match := _ERROR_COUNT.match(line):
            errors = int(match[1], 16)
        elif _COMPLAINT.match(line):
            complaints.append(line)
        else:
            strange.append(line)
    return Verdict(rounds, heartbeats, backwards, tuple(complaints), tuple(strange), errors)
