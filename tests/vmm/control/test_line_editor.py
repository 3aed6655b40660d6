"""Lines as they are typed: keys, history, completion, and that the screen always shows the line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.control.screen import rendered
from vmm.control.line_editor import MAX_LINE, LineEditor

WORDS = ["cont", "info", "migrate", "migrate_cancel", "stop"]


def complete(text: str) -> list[str]:
    return [word for word in WORDS if word.startswith(text.split(" ")[-1])] if " " not in text else []


class Typist:
    """An editor, what it gave, and what its screen shows."""

    def __init__(self) -> None:
        self.editor = LineEditor("> ", complete)
        self.editor.show_prompt()
        self.output = ""
        self.lines: list[str] = []

    def type(self, data: bytes) -> Typist:
        self.editor.feed(data)
        while (line := self.editor.next_line()) is not None:
            self.lines.append(line)
            self.editor.show_prompt()
        self.output += self.editor.take_output()
        return self

    @property
    def screen(self) -> list[str]:
        return rendered(self.output)


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (b"abc", "> abc|"),
        (b"abc\x7f\x08", "> a|"),
        (b"abc\x01x\x05y", "> xabcy|"),
        (b"abc\x1b[D\x1b[Dx", "> ax|bc"),
        (b"abc\x1b[D\x1b[D\x1b[C\x04", "> ab|"),
        (b"abc\x01\x1b[3~", "> |bc"),
        (b"abc\x1b[1~x\x1b[4~y\x1b[Hz\x1bOFw", "> zxabcyw|"),
        (b"one two  \x17", "> one |"),
        (b"one two\x17", "> one |"),
        (b"one two\x17\x17", "> |"),
        (b"one\x1b[5~\x1b[1;5C\x1bx\x02\x06", "> one|"),
        (b"\x7f\x04\x1b[D\x1b[C\x17\x10\x0e", "> |"),
        (b"inf\t", "> info |"),
        (b"in x\x1b[D\x1b[D\tz", "> info z| x"),
        (b"nothing\t", "> nothing|"),
        ("grün\x1b[D\x1b[Dx".encode(), "> grx|ün"),
        (b"\xff\xfe", "> \udcff\udcfe|"),
    ],
)
def test_keys(keys: bytes, shown: str) -> None:
    whole = Typist().type(keys)
    assert whole.screen == [shown]
    one_by_one = Typist()
    for key in keys:
        one_by_one.type(bytes([key]))
    assert one_by_one.screen == [shown]


def test_candidates_are_listed_in_columns() -> None:
    typist = Typist().type(b"mi\t")
    assert typist.screen == ["> mi", "migrate         migrate_cancel", "> migrate|"]


def test_history() -> None:
    typist = Typist().type(b"one\ntwo\n\n   \none\n")
    assert typist.lines == ["one", "two", "", "   ", "one"]
    assert typist.type(b"\x10").screen[-1] == "> one|"
    assert typist.type(b"\x1b[A\x1b[A\x1b[A").screen[-1] == "> two|"
    assert typist.type(b"\x0e\x1b[B").screen[-1] == "> |"
    for number in range(70):
        typist.type(b"%d\n" % number)
    assert typist.type(b"\x10" * 100).screen[-1] == "> 6|"


def test_a_line_is_bounded() -> None:
    typist = Typist().type(b"x" * 10_000 + b"\n")
    assert typist.lines == ["x" * MAX_LINE]
    assert len(typist.output) < 2 * MAX_LINE


KEYS = st.sampled_from(
    b"a|b| |mi|\xc3\xa4|\t|\n|\r|\x7f|\x01|\x04|\x05|\x17|\x10|\x0e|\x1b[A|\x1b[B|\x1b[C|\x1b[D|\x1b[3~|\x1b|"
    b"\x1b[|\xc3".split(b"|")
)


@given(st.lists(KEYS, max_size=60))
def test_the_screen_shows_the_line_whatever_is_typed(keys: list[bytes]) -> None:
    whole, pieces = Typist().type(b"".join(keys)), Typist()
    for key in keys:
        pieces.type(key)
    pieces.type(b"")
    assert pieces.lines == whole.lines
    assert pieces.screen == whole.screen
    line, cursor = pieces.editor._line, pieces.editor._cursor
    assert pieces.screen[-1] == f"> {line[:cursor]}|{line[cursor:]}"
