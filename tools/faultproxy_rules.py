"""What a fault proxy does to a byte stream, decided without a socket: rules in, bytes and actions out.

A rule is a line of four or five words; '#' begins a comment:

    CONNECTION DIRECTION OFFSET ACTION [ARGUMENT]

    CONNECTION  every | first | second | third | a number from 1
    DIRECTION   to-server | to-client | both
    OFFSET      a byte of that direction's stream (1000000, 64K, 1M); LOW..HIGH: one of these, by the seed
                and the connection's number; now: where the stream is (for a proxy that runs)
    ACTION      cut                  end the connection, both ways; what came before the offset arrives
                reset                the same with a TCP reset: what is on its way may be lost
                half-close           end this direction only
                stall [SECONDS]      pass nothing on any more, or for so long; nobody is told
                throttle BYTES       from here on so many bytes a second; 0 = as many as come
                corrupt [MASK]       change the byte at the offset: XOR with MASK, 0x01 unless told
                duplicate COUNT      the COUNT bytes from the offset on arrive twice

Rules of one direction take effect in the order of their offsets.
"""

from __future__ import annotations

import enum
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Action", "Direction", "Plan", "Rule", "RuleError", "Verb", "parse_rule", "parse_script"]


class RuleError(ValueError):
    """A rule that is none; the text says what was expected."""


class Direction(enum.Enum):
    """Whose bytes."""

    TO_SERVER = "to-server"
    TO_CLIENT = "to-client"


class Verb(enum.Enum):
    """What can happen to a stream."""

    CUT = "cut"
    RESET = "reset"
    HALF_CLOSE = "half-close"
    STALL = "stall"
    THROTTLE = "throttle"
    CORRUPT = "corrupt"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Action:
    """One thing that happens; `argument` is in the verb's unit, None where it takes none or was not given."""

    verb: Verb
    argument: float | None = None

    def __str__(self) -> str:
        return self.verb.value if self.argument is None else f"{self.verb.value} {self.argument:g}"


@dataclass(frozen=True)
class Rule:
    """One line of a script. `connection` 0 = every one; `low` None = now."""

    connection: int
    directions: tuple[Direction, ...]
    low: int | None
    high: int | None
    action: Action
    text: str

    def applies_to(self, connection: int, direction: Direction) -> bool:
        """Is this rule about connection number `connection` (1 = the first)?"""
        return self.connection in (0, connection) and direction in self.directions

    def offset(self, chooser: random.Random) -> int:
        """Where it takes effect."""
        assert self.low is not None, "a rule for now has no offset"
        return self.low if self.high is None else chooser.randint(self.low, self.high)


_ORDINALS = {"every": 0, "first": 1, "second": 2, "third": 3}
_SIZE = re.compile(r"(\d+)([KMG]?)")
_SCALE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_script(text: str) -> tuple[Rule, ...]:
    """The rules of a script. Raises RuleError with the number of the line."""
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.partition("#")[0].strip():
            try:
                rules.append(parse_rule(words))
            except RuleError as error:
                raise RuleError(f"line {number}: {error}") from error
    return tuple(rules)


def parse_rule(text: str) -> Rule:
    """One rule. Raises RuleError."""
    words = text.split()
    if len(words) not in (4, 5):
        raise RuleError(f"expected CONNECTION DIRECTION OFFSET ACTION [ARGUMENT], got '{text}'")
    connection, direction, offset, verb = words[:4]
    low, high = _parse_offset(offset)
    action = _parse_action(verb, words[4] if len(words) == 5 else None)
    if low is None and action.verb in (Verb.CORRUPT, Verb.DUPLICATE):
        raise RuleError(f"{verb} needs an offset")
    return Rule(_parse_connection(connection), _parse_directions(direction), low, high, action, text)


def _parse_connection(word: str) -> int:
    if word in _ORDINALS:
        return _ORDINALS[word]
    if word.isdecimal() and int(word) > 0:
        return int(word)
    raise RuleError(f"expected every, first, second, third or a number from 1, got '{word}'")


def _parse_directions(word: str) -> tuple[Direction, ...]:
    if word == "both":
        return tuple(Direction)
    try:
        return (Direction(word),)
    except ValueError:
        raise RuleError(f"expected to-server, to-client or both, got '{word}'") from None


def _parse_offset(word: str) -> tuple[int | None, int | None]:
    if word == "now":
        return None, None
    low, dots, high = word.partition("..")
    first = _parse_size(low)
    last = _parse_size(high) if dots else None
    if last is not None and last < first:
        raise RuleError(f"expected LOW..HIGH, got '{word}'")
    return first, last


def _parse_size(word: str) -> int:
    match = _SIZE.fullmatch(word)
    if match is None:
        raise RuleError(f"expected a number of bytes such as 4096, 64K or 1M, got '{word}'")
    return int(match[1]) * _SCALE[match[2]]


def _parse_action(word: str, argument: str | None) -> Action:
    try:
        verb = Verb(word)
    except ValueError:
        names = ", ".join(each.value for each in Verb)
        raise RuleError(f"expected one of {names}, got '{word}'") from None
    match verb:
        case Verb.CUT | Verb.RESET | Verb.HALF_CLOSE:
            if argument is not None:
                raise RuleError(f"{word} takes no argument, got '{argument}'")
            return Action(verb)
        case Verb.STALL:
            return Action(verb, None if argument is None else _parse_seconds(argument))
        case Verb.CORRUPT:
            return Action(verb, _parse_mask(argument or "0x01"))
        case Verb.THROTTLE | Verb.DUPLICATE:
            if argument is None:
                raise RuleError(f"{word} needs a number of bytes")
            size = _parse_size(argument)
            if verb is Verb.DUPLICATE and size == 0:
                raise RuleError("duplicate needs at least one byte")
            return Action(verb, size)


def _parse_seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RuleError(f"expected seconds, got '{word}'")
    return seconds


def _parse_mask(word: str) -> int:
    try:
        mask = int(word, 0)
    except ValueError:
        mask = 0
    if not 0 < mask < 256:
        raise RuleError(f"expected a mask from 0x01 to 0xff, got '{word}'")
    return mask


class Plan:
    """What happens to one direction of one connection; `feed` is its only door."""

    def __init__(
        self, rules: Iterable[Rule], connection: int, direction: Direction, seed: int | str = 0
    ) -> None:
        chooser = random.Random(f"{seed}/{connection}/{direction.value}")
        chosen = [rule for rule in rules if rule.low is not None and rule.applies_to(connection, direction)]
        steps = [(rule.offset(chooser), rule.action) for rule in chosen]
        self._steps = sorted(steps, key=lambda step: step[0])
        self._copying: bytearray | None = None
        self._copy_end = 0
        self.offset = 0
        """Bytes taken so far: the place in the stream as its sender wrote it."""

    def add(self, offset: int, action: Action) -> None:
        """One more step. Raises RuleError if the stream is beyond its offset."""
        if offset < self.offset:
            raise RuleError(f"the stream is at {self.offset} already, {offset} is past")
        self._steps = sorted([*self._steps, (offset, action)], key=lambda step: step[0])

    def clear(self) -> None:
        """Nothing happens any more."""
        self._steps = []

    def feed(self, data: bytes) -> Iterator[bytes | Action]:
        """What becomes of `data`: bytes to pass on and actions to take, in order.

        An action comes as soon as the byte before its offset has come: with the first `feed` at the latest
        for offset 0, which may be called with nothing.
        """
        while True:
            yield from self._end_copy()
            while self._steps and self._steps[0][0] == self.offset:
                action = self._steps[0][1]
                if action.verb is Verb.CORRUPT and not data:
                    return  # its byte has not come
                self._steps.pop(0)
                if action.verb is Verb.CORRUPT:
                    data = bytes([data[0] ^ int(action.argument or 0)]) + data[1:]
                elif action.verb is Verb.DUPLICATE:
                    self._copying, self._copy_end = bytearray(), self.offset + int(action.argument or 0)
                else:
                    yield action
            if not data:
                return
            piece = data[: self._run(len(data))]
            data = data[len(piece) :]
            self.offset += len(piece)
            if self._copying is not None:
                self._copying += piece
            yield piece

    def _run(self, length: int) -> int:
        """How many bytes can pass before something happens."""
        ends = [self.offset + length, *(offset for offset, _ in self._steps[:1])]
        if self._copying is not None:
            ends.append(self._copy_end)
        return min(ends) - self.offset

    def _end_copy(self) -> Iterator[bytes]:
        if self._copying is not None and self.offset >= self._copy_end:
            copy, self._copying = bytes(self._copying), None
            yield copy
