"""The terminal on stdin: raw enough for a serial console, and as it was when the process ends."""

from __future__ import annotations

import atexit
import os
import termios

__all__ = ["Terminal"]


class Terminal:
    """Does nothing if stdin is no terminal, or is one on which we are in the background."""

    def __init__(self, fd: int, *, signals: bool) -> None:
        """`signals`: Ctrl-C and Ctrl-Z keep their meaning (QEMU's signal=on)."""
        self._fd = fd
        self._saved: list[object] | None = None
        if not os.isatty(fd) or _is_in_background(fd):
            return
        self._saved = termios.tcgetattr(fd)
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(fd)
        iflag &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        oflag |= termios.OPOST
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not signals:
            lflag &= ~termios.ISIG
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        self._ours: list[object] = [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]
        self.take_back()
        atexit.register(self.restore)

    def take_back(self) -> None:
        """After a stop and SIGCONT: the shell has given the terminal back in its own mode."""
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._ours)  # type: ignore[arg-type]  # as we got it

    def restore(self) -> None:
        """Give the terminal back as it was; once is enough."""
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)  # type: ignore[arg-type]  # as we got it
            self._saved = None
            atexit.unregister(self.restore)


def _is_in_background(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()  # changing it would stop us with SIGTTOU
    except OSError:
        return False  # not our controlling terminal: nobody minds
