"""Invariant: whatever is typed at the human monitor, the screen shows the line, every line gets an answer.

no exception; the same lines and the same screen however the keys are cut; output ends with a line's end
"""

from __future__ import annotations

import asyncio
import functools

from tests.vmm.control.fakes import FakeVm, make_vm
from tests.vmm.control.screen import rendered
from vmm.control.human import HumanMonitor
from vmm.control.line_editor import LineEditor

SEEDS = [
    b"info status\n",
    b"migrate -d tcp:h:1\r\nmigrate_set_capability events on\n",
    b"ab\x7fc\x1b[D\x1b[3~x\x01y\x05z\x17\n",
    b"inf\t st\t\n\x10\x10\x0e\n",
    b'migrate "a\\"b\\n" x\nhelp info\n? c\nmigrate_set_parameter max-bandwidth 1G\n',
]
TOKENS = b'info |migrate|\x1b[A|\x1b[D|\x1b[3~|\x09|\x10|\x7f|\x0a|quit|-d |"|migrate_set_parameter '.split(
    b"|"
)


def check(data: bytes) -> None:
    """One input: keys, typed at once and one by one."""
    human = a_vm().control.human
    whole, by_key = typed([data], human), typed([data[at : at + 1] for at in range(len(data))], human)
    assert whole == by_key
    for line in whole[0]:
        answer = human.execute(line)
        assert answer == "" or answer.endswith("\r\n"), (line, answer)


@functools.cache
def a_vm() -> FakeVm:
    """The same for all inputs; nothing here runs a loop."""
    loop = asyncio.new_event_loop()
    loop.close()
    return make_vm(loop)


def typed(pieces: list[bytes], human: HumanMonitor) -> tuple[list[str], list[str]]:
    """The lines, and the screen at the end."""
    editor = LineEditor("> ", human.complete)
    editor.show_prompt()
    lines, output = [], ""
    for piece in [*pieces, b""]:
        editor.feed(piece)
        while (line := editor.next_line()) is not None:
            lines.append(line)
            editor.show_prompt()
        output += editor.take_output()
    return lines, rendered(printable(output))


def printable(output: str) -> str:
    """Without what a terminal shows in its own way: other control characters that were typed."""
    return "".join(each for each in output if each >= " " or each in "\r\n\x1b")
