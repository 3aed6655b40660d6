"""A command line of the human monitor: how a command is described, and what a line says by that.

The parameters of a command are in QEMU's notation, `name:kind` with commas between:

    -d      a flag; any order among flags, before the rest
    s, S    a word, or "quoted text"; S takes the rest of the line
    b       on or off
    i       a number, decimal, octal or hexadecimal
    i?      a number that may be missing

Source: QEMU 7.2 monitor/hmp.c (the kinds, the texts), tried on QEMU 7.2.22.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vmm.control.interfaces import FdTaker

__all__ = ["Arguments", "BadArguments", "Caller", "HumanCommand", "WaitUntil"]

Arguments = dict[str, Any]
WaitUntil = Callable[[Callable[[], bool]], None]

_WORD = re.compile(r'[ \t]*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<word>[^\s"]\S*))')
_ESCAPES: Final = {"n": "\n", "r": "\r"}


class BadArguments(Exception):
    """The line does not fit the command; the text is what QEMU prints."""


@dataclass(frozen=True)
class Caller:
    """Where a line comes from, and what a command may ask of it.

    `fds` are the descriptors that `fd:NAME` refers to. `wait_until` is what a terminal gives that can wait:
    it takes a condition, and shows the next prompt when it holds.
    """

    fds: FdTaker | None = None
    wait_until: WaitUntil | None = None


@dataclass(frozen=True)
class HumanCommand:
    """A row of a table of commands: `names` with | between; `usage` and `help` are what help shows."""

    names: str
    help: str
    handler: Callable[[Arguments, Caller], str | None]
    usage: str = ""
    parameters: str = ""

    def matches(self, name: str) -> bool:
        """Whether `name` is one of its names."""
        return name in self.names.split("|")

    def line(self, prefix: str = "") -> str:
        """Its line of help."""
        return f"{prefix}{self.names} {self.usage} -- {self.help}\n"

    def parse(self, rest: str) -> Arguments:
        """The arguments in what follows the name. Raises BadArguments."""
        kinds = dict(each.split(":") for each in self.parameters.split(",") if each)
        flags = {kind[1]: name for name, kind in kinds.items() if kind[0] == "-"}
        arguments, rest = self._flags(flags, rest.lstrip())
        for name, kind in kinds.items():
            if kind[0] != "-":
                arguments[name], rest = self._value(kind, rest)
        if rest:
            raise BadArguments(f"{self.names}: extraneous characters at the end of line")
        return arguments

    def _flags(self, flags: dict[str, str], rest: str) -> tuple[Arguments, str]:
        arguments: Arguments = dict.fromkeys(flags.values(), False)
        while flags and rest.startswith("-"):
            flag, _, tail = rest[1:].partition(" ")
            if flag[:1] not in flags:
                raise BadArguments(f"{self.names}: unsupported option -{flag[:1]}")
            if len(flag) > 1:
                raise BadArguments(f"{self.names}: extraneous characters at the end of line")
            arguments[flags[flag]] = True
            rest = tail.lstrip()
        return arguments, rest

    def _value(self, kind: str, rest: str) -> tuple[Any, str]:
        """The next value, and what follows it."""
        if kind == "S":
            return rest or None, ""
        match = _WORD.match(rest)
        if match is None:
            if kind == "i?":
                return None, rest
            missing = "unexpected end of expression" if kind == "i" else f"{self.names}: string expected"
            raise BadArguments(missing)
        word = match["word"] if match["quoted"] is None else _unquote(match["quoted"])
        return _of_kind(kind, word), rest[match.end() :].lstrip()


def _of_kind(kind: str, word: str) -> Any:
    if kind == "b":
        if word not in ("on", "off"):
            raise BadArguments("Expected 'on' or 'off'")
        return word == "on"
    return _number(word) if kind[0] == "i" else word


def _number(word: str) -> int:
    """As C writes it; QEMU's other expressions are not understood."""
    if not word[:1].isdigit() and word[:1] != "-":
        raise BadArguments(f"invalid char '{word[:1]}' in expression")
    try:
        return int(re.sub(r"^(-?)0([0-7]+)$", r"\g<1>0o\2", word), 0)
    except ValueError:
        raise BadArguments(f"'{word}' is not a number") from None


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text)
