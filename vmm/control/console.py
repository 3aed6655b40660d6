"""The human monitor at the end of a character backend: banner, prompt, and lines executed as they are typed.

    backend --receive--> [ line editor ] --line--> HumanMonitor.execute --text--> backend

Rules:
1. Everything runs on the loop's thread.
2. One line at a time: while its output waits for the backend, or while it waits itself (`migrate` without
   -d), no more input is taken. Nothing is executed before `release`: what it acts on may not be there.
3. On a shared backend nothing is shown while another user has the focus, as in QEMU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmm.control.human import HumanMonitor
from vmm.control.interfaces import CharBackend
from vmm.control.line_editor import LineEditor

__all__ = ["HumanConsole"]

PROMPT = "(qemu) "
INPUT_BYTES = 4096
POLL_S = 0.05
"""Between two looks at whether what a line waits for is over."""


class HumanConsole:
    """One human monitor. It is the frontend of its backend."""

    def __init__(
        self, human: HumanMonitor, backend: CharBackend, banner: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._human = human
        self._backend = backend
        self._banner = banner
        self._loop = loop
        self._editor = LineEditor(PROMPT, human.complete)
        self._pending = bytearray()
        self._waits_for: Callable[[], bool] | None = None
        self._is_held = True
        self._has_focus = True
        self._is_greeted = False
        self._is_working = False

    # Section: called by the backend

    def opened(self) -> None:
        """Somebody has come: greet."""
        self._editor = LineEditor(PROMPT, self._human.complete)
        self._pending.clear()
        self._is_greeted = self._has_focus
        self._pending += self._banner.encode()
        self._editor.show_prompt()
        self._show()

    def focus(self, has_focus: bool) -> None:
        """On a shared backend: typed text comes here, or no longer does."""
        if has_focus == self._has_focus:
            return
        if has_focus and self._is_greeted:
            self._editor.show_prompt()
        elif not has_focus and self._is_greeted:
            self._pending += b"\r\n"
            self._show()
        self._has_focus = has_focus
        self._is_greeted = self._is_greeted or has_focus
        self._show()

    def can_receive(self) -> int:
        """How many bytes are welcome."""
        return 0 if self._pending or self._is_held or self._waits_for is not None else INPUT_BYTES

    def release(self) -> None:
        """From now on lines are executed."""
        self._is_held = False
        self._work()

    def receive(self, data: bytes) -> None:
        """Typed bytes."""
        self._editor.feed(data)
        self._work()

    def backend_writable(self) -> None:
        """The backend takes more."""
        self._show()
        self._work()

    # Section: work

    def _work(self) -> None:
        """Execute the lines that are there, each when the output of the one before is out."""
        if self._is_working:
            return
        self._is_working = True
        while self.can_receive():
            line = self._editor.next_line()
            if line is not None:
                self._show()
                text = self._human.execute(line, wait_until=self._wait_until)
                self._pending += text.encode("utf-8", "surrogateescape")
                if self._waits_for is None:
                    self._editor.show_prompt()
            self._show()
            if line is None:
                break
        self._is_working = False
        if self.can_receive():
            self._backend.accept_input()

    def _wait_until(self, is_over: Callable[[], bool]) -> None:
        self._waits_for = is_over
        self._loop.call_later(POLL_S, self._look)

    def _look(self) -> None:
        if self._waits_for is None:
            return
        if not self._waits_for():
            self._loop.call_later(POLL_S, self._look)
            return
        self._waits_for = None
        self._editor.show_prompt()
        self._show()
        self._work()

    def _show(self) -> None:
        """Give the backend what it takes."""
        self._pending += self._editor.take_output().encode("utf-8", "surrogateescape")
        if self._has_focus and self._pending:
            taken = self._backend.write_nowait(bytes(self._pending))
            del self._pending[:taken]
