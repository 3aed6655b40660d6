"""~ A byte stream -> JSON messages: finds where each ends, in time linear in the bytes, at any split.

    feed(bytes) -> [ buffer ] -> next_message(): a value | a JsonSyntaxError | None (more bytes are needed)

No separator is needed between messages; any token at the top level is a message of its own, as in QEMU. A
message ends when as many braces and brackets were closed as were opened. Strings are jumped over by one
regular expression each, and the position of the scan is kept between calls, so no byte is looked at twice.

One error a bad message. QEMU sends one for each stray token; here the scanner is *quiet* after an error
until the bad message is over. Where is that? The rules, first match wins:

1. A control byte (other than tab, LF, CR outside strings), 0xfe or 0xff takes the scanner out of any bracket
   and string at once: this is how clients resynchronise.
2. An object with a member `execute` or `exec-oob` that starts inside it is taken as the next command: that
   is where QEMU would find its way back, and no command may be swallowed. It is known by its first member.
3. It ends with the bracket that closes it. If the error was outside any bracket, with the line, or before
   the next `{`.

One call takes a few milliseconds at most: what needs more steps is left for the next one (`is_paused`). A bad
message longer than any good one may be is not QMP: `is_hopeless`.
"""

from __future__ import annotations

import re
from typing import Any, Final

from qmp.errors import JsonSyntaxError
from qmp.json_text import REFUSED, first_lexical_error, parse_json, parse_plain

__all__ = ["MAX_DEPTH", "MAX_MARKS", "MAX_MESSAGE_BYTES", "NOT_READY", "JsonStream"]

MAX_MESSAGE_BYTES: Final = 16 << 20
"""QEMU allows 64 MiB a token; its clients read at most 10 MiB a reply."""
MAX_DEPTH: Final = 1024
"""As QEMU."""
MAX_MARKS: Final = 1 << 16
"""Commas and opening brackets in a message. Arbitrary: a tenth of a second for the strict parser."""
NOT_READY: Final = object()
"""What `next_message` gives when more bytes are needed, or time (None is a message: `null`)."""
MAX_STEPS: Final = 2000
"""Strings and brackets, or runs of brackets, that one call looks at. Arbitrary: some milliseconds' work."""

_WHOLE_LINE_BYTES: Final = 4096
_EXACT_ERROR_BYTES: Final = 65536
_SPACE = re.compile(rb"[ \t\r\n]*+")
_PLAIN = re.compile(rb"[ \t\r\n,:\-+.0-9a-zE]*+")
_SCALAR = re.compile(rb"[\-+.0-9a-zE]*+")
_STRING_BODY = {
    ord('"'): re.compile(rb'(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+'),
    ord("'"): re.compile(rb"(?:[^'\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+"),
}
# What a bad message may be skipped by without a thought, inside its brackets and outside any.
_BAD_INSIDE = re.compile(rb"[^{}\[\]\"'\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff]*+")
_BAD_OUTSIDE = re.compile(rb"[^{\n]*+")
_BRACKETS = re.compile(rb"[{\[]++|[}\]]++")
_COMMAND_START = re.compile(rb"""\{[ \t\r\n]{0,64}+["'](?:execute|exec-oob|arguments|id)["']""")
_COMMAND_PREFIX = re.compile(rb"""\{[ \t\r\n]{0,64}+(?:["'][a-z-]{0,9}+)?\Z""")
_BACKSLASH, _RETURN = b"\\\r"
_RESET_BYTES = frozenset([*range(0x20), 0xFE, 0xFF]) - frozenset(b"\t\r\n")


class JsonStream:
    """The incremental framing of one connection's input.

    Never raises: errors come out of `next_message`, and the stream goes on with the next message.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_depth: int = MAX_DEPTH,
        max_marks: int = MAX_MARKS,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._max_depth = max_depth
        self._max_marks = max_marks
        self._buffer = bytearray()
        self._start = 0  # of the message being read
        self._position = 0  # of the scan
        self._braces = 0
        self._brackets = 0
        self._quote = 0  # the quote of the string the scan is in, or 0
        self._quiet_depth: int | None = None  # brackets still open of a bad message
        self._skipped = 0  # bytes of a bad message
        self._steps = 0  # in the message being read, as the next two
        self._marks = 0  # commas and opening brackets
        self._colons = 0
        self._ended = False
        self.is_paused = False

    @property
    def is_hopeless(self) -> bool:
        """Whether a bad message has gone on for longer than a good one may."""
        return self._skipped > self._max_message_bytes

    def feed(self, data: bytes) -> None:
        """Take bytes in, of any length and cut anywhere."""
        if self._start:
            del self._buffer[: self._start]
            self._position -= self._start
            self._start = 0
        self._buffer += data

    def feed_eof(self) -> None:
        """No more bytes will come: a number or keyword at the very end is complete."""
        self._ended = True

    @property
    def is_mid_message(self) -> bool:
        """Once `next_message` gave NOT_READY: whether it is in a message, good or bad, that is not over."""
        return bool(self._braces or self._brackets or self._quote) or self._quiet_depth is not None

    @property
    def has_unread(self) -> bool:
        """Whether there are bytes, other than space, that no call of `next_message` has looked at."""
        return _match_end(_SPACE, self._buffer, self._position) < len(self._buffer)

    def next_message(self) -> Any:
        """The next value, or the JsonSyntaxError of the next bad message, or NOT_READY.

        After NOT_READY `is_paused` says whether another call will go on with the bytes that are there.
        """
        budget = _Budget(MAX_STEPS)
        found = self._next_message(budget)
        self.is_paused = found is NOT_READY and budget.is_spent
        return found

    def _next_message(self, budget: _Budget) -> Any:
        while True:
            if self._braces == 0 and self._brackets == 0:
                if self._quiet_depth is not None:
                    if not self._skip(budget):
                        return NOT_READY
                    if self._quiet_depth is None:
                        continue
                elif self._position == self._start:
                    value = self._whole_line()
                    if value is not REFUSED:
                        return value
            was_quiet = self._quiet_depth is not None
            before = self._position
            found = self._scan(budget)
            if was_quiet:
                self._skipped += self._position - before
            if found is NOT_READY:
                return found
            self._steps = self._marks = self._colons = 0
            if not was_quiet:
                return found
            if type(found) is dict and ("execute" in found or "exec-oob" in found):
                self._quiet_depth = None
                self._skipped = 0
                return found

    def _whole_line(self) -> Any:
        """The common case in one step: what is left of the line is one small object."""
        buffer = self._buffer
        start = _match_end(_SPACE, buffer, self._start)
        self._start = self._position = start
        if start >= len(buffer) or buffer[start] != ord("{"):
            return REFUSED
        end = buffer.find(b"\n", start, start + _WHOLE_LINE_BYTES)
        if end < 0:
            end = len(buffer)
        if buffer[end - 1] == _RETURN:
            end -= 1
        if buffer[end - 1] != ord("}") or end - start > _WHOLE_LINE_BYTES:
            return REFUSED
        value = parse_plain(buffer[start:end])
        if value is not REFUSED:
            self._start = self._position = end
        return value

    def _scan(self, budget: _Budget) -> Any:
        """Go on to the end of the message; give its value, its error, or NOT_READY."""
        buffer, size = self._buffer, len(self._buffer)
        while budget.take():
            self._steps += 1
            if self._marks > self._max_marks or self._steps > 4 * self._max_marks:
                return self._fail(JsonSyntaxError("JSON token count limit exceeded"))
            if self._quote:
                ended = self._scan_string()
                if isinstance(ended, JsonSyntaxError):
                    return ended
                if not ended:
                    break
                if self._braces == 0 and self._brackets == 0:
                    return self._take(self._position)
            top = self._braces == 0 and self._brackets == 0
            if top and self._position == self._start:
                self._start = self._position = _match_end(_SPACE, buffer, self._position)
            else:
                end = _match_end(_SCALAR if top else _PLAIN, buffer, self._position)
                if not top:
                    self._marks += buffer.count(b",", self._position, end)
                    self._colons += buffer.count(b":", self._position, end)
                self._position = end
                if top and (self._position < size or self._ended):
                    return self._take(self._position)
            if self._position >= size:
                break
            byte = buffer[self._position]
            if top and _match_end(_SCALAR, buffer, self._position) > self._position:
                self._position += 1
                continue
            self._position += 1
            if byte in b"\"'":
                self._quote = byte
            elif byte in b"{}[]":
                self._marks += byte in b"{["
                self._braces += (byte == ord("{")) - (byte == ord("}"))
                self._brackets += (byte == ord("[")) - (byte == ord("]"))
                depth = self._braces + self._brackets
                if depth > self._max_depth:
                    return self._fail(JsonSyntaxError("JSON nesting depth limit exceeded"))
                if depth <= 0 or self._braces < 0 or self._brackets < 0:
                    if depth == 0 and self._braces == 0:
                        return self._take(self._position)
                    return self._take_unbalanced()
            elif byte in b",:":
                return self._take(self._position)
            else:
                return self._fail(self._lexical_error(self._position))
        if self._position - self._start > self._max_message_bytes:
            return self._fail(JsonSyntaxError("JSON token size limit exceeded"))
        return NOT_READY

    def _scan_string(self) -> bool | JsonSyntaxError:
        """True: the string is over. False: more bytes are needed."""
        buffer = self._buffer
        position = _match_end(_STRING_BODY[self._quote], buffer, self._position)
        self._position = position
        if position >= len(buffer):
            return False
        if buffer[position] == self._quote:
            self._quote = 0
            self._position = position + 1
            return True
        if buffer[position] == _BACKSLASH:
            if position + 1 >= len(buffer):
                return False
            position += 1
        self._position = position + 1
        return self._fail(self._lexical_error(position + 1))

    def _lexical_error(self, end: int) -> JsonSyntaxError:
        """The error for the byte before `end`; of a long message only that byte is shown."""
        start = self._start if end - self._start <= _EXACT_ERROR_BYTES else end - 1
        return first_lexical_error(bytes(self._buffer[start:end]))

    def _take(self, end: int) -> Any:
        """The message [start, end) is complete; `null` and friends are values like any other."""
        start = self._start
        bracketed = self._buffer[start] in b"{["
        self._start = self._position = end
        self._braces = self._brackets = 0
        if end - start > self._max_message_bytes:
            return JsonSyntaxError("JSON token size limit exceeded")
        if self._marks > self._max_marks:
            return JsonSyntaxError("JSON token count limit exceeded")
        try:
            # Both views are released here, whatever still refers to them: the buffer has to change its size.
            with memoryview(self._buffer) as whole, whole[start:end] as text:
                return parse_json(text, self._colons)
        except JsonSyntaxError as error:
            if not bracketed and self._quiet_depth is None:
                self._quiet_depth = 0
            return error

    def _take_unbalanced(self) -> Any:
        """More of one kind of bracket was closed than opened; what is still open of the other is bad too."""
        still_open = max(self._braces, 0) + max(self._brackets, 0)
        quiet_depth = self._quiet_depth
        error = self._take(self._position)
        assert isinstance(error, JsonSyntaxError), "unbalanced brackets parsed"
        self._quiet_depth = still_open + (quiet_depth or 0)
        return error

    def _fail(self, error: JsonSyntaxError) -> JsonSyntaxError:
        """The message is bad at the byte before the position; be quiet until it is over."""
        last = self._buffer[self._position - 1] if self._position else 0
        depth = self._braces + self._brackets + (self._quiet_depth or 0)
        if last in _RESET_BYTES or self._quote:
            depth = 0
        self._start = self._position
        self._braces = self._brackets = self._quote = 0
        self._quiet_depth = depth
        return error

    def _skip(self, budget: _Budget) -> bool:
        """Drop the rest of a bad message. False: more bytes are needed, all that came were dropped, or time.

        True with the quiet depth None: the bad message is over. True with a number: at the start of an object
        inside it, which may be a command.
        """
        before = self._position
        try:
            return self._skip_on(budget)
        finally:
            self._skipped = 0 if self._quiet_depth is None else self._skipped + self._position - before

    def _skip_on(self, budget: _Budget) -> bool:
        buffer, size = self._buffer, len(self._buffer)
        assert self._quiet_depth is not None
        while budget.take():
            if self._quiet_depth == 0:
                self._quote = 0
                self._position = _match_end(_BAD_OUTSIDE, buffer, self._position)
            elif self._quote:
                self._position = _match_end(_STRING_BODY[self._quote], buffer, self._position)
            else:
                self._position = _match_end(_BAD_INSIDE, buffer, self._position)
            self._start = self._position
            if self._position >= size:
                return False
            byte = buffer[self._position]
            if self._quiet_depth == 0 and byte == ord("{"):
                self._quiet_depth = None
                return True
            if byte in b"{}[]" and not self._quote:
                if (at_object := self._skip_brackets(self._quiet_depth)) is not None:
                    return at_object
                continue
            if self._quote and byte == _BACKSLASH and self._position + 1 >= size:
                return False
            self._position += 1
            self._start = self._position
            if self._quiet_depth == 0:
                self._quiet_depth = None
                return True
            if self._quote:
                if byte != self._quote:
                    self._quiet_depth = 0
                self._quote = 0
            elif byte in b"\"'":
                self._quote = byte
            else:
                self._quiet_depth = 0
        return False

    def _skip_brackets(self, depth: int) -> bool | None:
        """Go over a run of brackets inside a bad message; what `_skip` gives, or None to go on with it."""
        buffer, start = self._buffer, self._position
        run = _BRACKETS.match(buffer, start)
        assert run is not None, "called at a bracket"
        end = run.end()
        if buffer[start] in b"}]":
            length = min(end - start, depth)
            self._quiet_depth = depth - length if length < depth else None
            self._start = self._position = start + length
            return True if self._quiet_depth is None else None
        if buffer[end - 1] == ord("{"):
            is_command = _COMMAND_START.match(buffer, end - 1) is not None
            if is_command or _COMMAND_PREFIX.match(buffer, end - 1):
                self._quiet_depth = depth + end - 1 - start
                self._start = self._position = end - 1
                return is_command
        self._quiet_depth = depth + end - start
        self._start = self._position = end
        return None


class _Budget:
    """How many steps may still be taken."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def take(self) -> bool:
        """One more, if there is one."""
        self._left -= 1
        return self._left >= 0

    @property
    def is_spent(self) -> bool:
        """Whether one was asked for and refused."""
        return self._left < 0


def _match_end(pattern: re.Pattern[bytes], buffer: bytearray, position: int) -> int:
    """Where a match of a pattern that also matches nothing ends."""
    match = pattern.match(buffer, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()
