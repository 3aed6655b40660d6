"""-daemonize: the background process, made before anything that a fork would break exists.

    the user's process ---fork---> setsid ---fork---> the VM
           | reads a pipe                              | says "listening", or the text of its error
           v                                           v
       exit 0 or 1                              chdir /, stdio to /dev/null

No thread, userfaultfd, engine or event loop may exist when `daemonize` is called: none would survive.
Source: QEMU 7.2 os-posix.c (os_daemonize, os_setup_post).
"""

from __future__ import annotations

import contextlib
import os
import sys

from vmm.messages import Heading

__all__ = ["Readiness", "daemonize", "write_pidfile"]

READY = b"\0"


class Readiness:
    """How the VM tells who started it that it listens, or why it does not."""

    def __init__(self, heading: Heading, pipe: int | None = None) -> None:
        """Errors begin with `heading`. `pipe` leads to the parent of a daemon; None: the user sees stderr."""
        self._heading = heading
        self._pipe = pipe

    def succeeded(self) -> None:
        """Every socket listens: the parent may end; leave its terminal and folder."""
        if self._pipe is None:
            return
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        self._tell(READY)

    def failed(self, text: str) -> None:
        """Show the user why there is no VM."""
        line = self._heading.line(text)
        if self._pipe is None:
            print(line, file=sys.stderr)
        else:
            self._tell(line.encode("utf-8", "replace"))

    def _tell(self, data: bytes) -> None:
        assert self._pipe is not None
        pipe, self._pipe = self._pipe, None
        with contextlib.suppress(OSError):  # the parent was killed
            os.write(pipe, data)
        os.close(pipe)


def daemonize(heading: Heading) -> Readiness:
    """Returns in the daemon; the caller's process waits for its word and exits."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(writer)
        _wait_for_word(reader, heading)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.umask(0o027)
    return Readiness(heading, writer)


def _wait_for_word(pipe: int, heading: Heading) -> None:
    """In the user's process: never returns."""
    word = b""
    while chunk := os.read(pipe, 4096):
        word += chunk
    if word == READY:
        os._exit(0)
    silence = heading.line("The background process ended without a word")
    print(word.decode("utf-8", "replace") or silence, file=sys.stderr, flush=True)
    os._exit(1)


def write_pidfile(path: str) -> None:
    """Write our process id to `path`, created with mode 0644. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, b"%d\n" % os.getpid())
    finally:
        os.close(fd)
