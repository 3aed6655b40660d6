"""~ A line of the human monitor while it is typed: keys in, lines and what the terminal has to show out.

    feed(bytes) -> [ keys ] -> next_line()        take_output() -> text with cursor movements

The keys are those of QEMU's monitor (`util/readline.c`): arrows, Home, End, Delete, Ctrl-A and Ctrl-E,
Ctrl-D, Ctrl-W, Ctrl-N and Ctrl-P, Tab. Where QEMU draws the whole line anew for each key, here only what
comes after the first difference is drawn: the screen is the same, and a long line costs no square.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Final

__all__ = ["MAX_LINE", "LineEditor"]

MAX_LINE: Final = 4095
"""Characters, as QEMU's READLINE_CMD_BUF_SIZE; more are not taken."""
MAX_HISTORY: Final = 64
SCREEN_COLUMNS: Final = 80

_CSI_KEYS: Final = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_TILDE_KEYS: Final = {"1": "home", "3": "delete", "4": "end", "7": "home", "8": "end"}
_CONTROL_KEYS: Final = {
    "\x01": "home",
    "\x04": "delete",
    "\x05": "end",
    "\b": "backspace",
    "\x7f": "backspace",
    "\t": "tab",
    "\x0e": "down",
    "\x10": "up",
    "\x17": "kill_word",
}


class LineEditor:
    """One terminal's current line, and the lines before it."""

    def __init__(self, prompt: str, complete: Callable[[str], list[str]]) -> None:
        """`complete`: what the last word of a text may become, without what stands before it."""
        self._prompt = prompt
        self._complete = complete
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._keys = ""
        self._escape = ""
        self._history: list[str] = []
        self._recalled = 0  # index into the history, its length for the line being typed
        self._line, self._cursor = "", 0
        self._shown, self._shown_cursor = "", 0
        self._output: list[str] = []

    def feed(self, data: bytes) -> None:
        """Take keys in; they wait for `next_line`."""
        self._keys += self._decoder.decode(data)

    def show_prompt(self) -> None:
        """Begin a line; whatever of an earlier one was typed is forgotten."""
        self._line, self._cursor = "", 0
        self._shown, self._shown_cursor = "", 0
        self._recalled = len(self._history)
        self._output.append(self._prompt)

    def next_line(self) -> str | None:
        """The next whole line, or None if there is none yet. Call `show_prompt` after dealing with it."""
        for position, key in enumerate(self._keys):
            if key in "\r\n" and not self._escape:
                self._keys = self._keys[position + 1 :]
                self._draw()
                self._output.append("\r\n")
                self._remember()
                return self._line
            self._press(key)
        self._keys = ""
        self._draw()
        return None

    def take_output(self) -> str:
        """What is to be shown since the last call."""
        output = "".join(self._output)
        self._output.clear()
        return output

    # Section: keys

    def _press(self, key: str) -> None:
        if self._escape:
            self._escape += key
            if len(self._escape) == 2 and key in "[O":
                return
            if self._escape[1] == "[" and (key.isdigit() or key == ";"):
                if len(self._escape) > 16:
                    self._escape = ""
                return
            name = _TILDE_KEYS.get(self._escape[2:3]) if key == "~" else _CSI_KEYS.get(key)
            if len(self._escape) == 2:
                name = None
            self._escape = ""
        elif key == "\x1b":
            self._escape = key
            return
        else:
            name = _CONTROL_KEYS.get(key)
            if name is None and key >= " ":
                self._insert(key)
        if name is not None:
            getattr(self, f"_{name}")()

    def _insert(self, text: str) -> None:
        text = text[: MAX_LINE - len(self._line)]
        self._line = self._line[: self._cursor] + text + self._line[self._cursor :]
        self._cursor += len(text)

    def _delete_from(self, start: int) -> None:
        self._line = self._line[:start] + self._line[self._cursor :]
        self._cursor = start

    def _backspace(self) -> None:
        if self._cursor:
            self._delete_from(self._cursor - 1)

    def _delete(self) -> None:
        self._line = self._line[: self._cursor] + self._line[self._cursor + 1 :]

    def _kill_word(self) -> None:
        before = self._line[: self._cursor].rstrip(" ")
        self._delete_from(before.rfind(" ") + 1)

    def _home(self) -> None:
        self._cursor = 0

    def _end(self) -> None:
        self._cursor = len(self._line)

    def _left(self) -> None:
        self._cursor = max(0, self._cursor - 1)

    def _right(self) -> None:
        self._cursor = min(len(self._line), self._cursor + 1)

    def _up(self) -> None:
        self._recall(self._recalled - 1)

    def _down(self) -> None:
        self._recall(self._recalled + 1)

    def _recall(self, index: int) -> None:
        if 0 <= index <= len(self._history):
            self._recalled = index
            self._line = [*self._history, ""][index]
            self._end()

    def _remember(self) -> None:
        if self._line.strip():
            if self._line in self._history:
                self._history.remove(self._line)
            self._history.append(self._line)
            del self._history[:-MAX_HISTORY]

    # Section: completion

    def _tab(self) -> None:
        before = self._line[: self._cursor]
        typed = before[before.rfind(" ") + 1 :]
        candidates = sorted(self._complete(before))
        if not candidates:
            return
        self._draw()
        if len(candidates) > 1:
            self._output.append(f"\r\n{_in_columns(candidates)}{self._prompt}")
            self._shown, self._shown_cursor = "", 0
        self._insert(_common_start(candidates)[len(typed) :] + (" " if len(candidates) == 1 else ""))

    # Section: the screen

    def _draw(self) -> None:
        """Bring what is shown to what is so."""
        shown, line = self._shown, self._line
        if line != shown:
            common = len(_common_start([shown, line]))
            self._move(self._shown_cursor, common)
            self._output.append(line[common:] + "\x1b[K")
            self._shown, self._shown_cursor = line, len(line)
        self._move(self._shown_cursor, self._cursor)
        self._shown_cursor = self._cursor

    def _move(self, here: int, there: int) -> None:
        self._output.append("\x1b[C" * (there - here) if there > here else "\x1b[D" * (here - there))


def _common_start(words: list[str]) -> str:
    first, last = min(words), max(words)  # what these two share, all between them share
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def _in_columns(words: list[str]) -> str:
    width = max(map(len, words)) + 2
    per_row = max(1, SCREEN_COLUMNS // width)
    rows = [words[at : at + per_row] for at in range(0, len(words), per_row)]
    return "".join("".join(word.ljust(width) for word in row) + "\r\n" for row in rows)
