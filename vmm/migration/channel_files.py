"""Channels that end in a file or a command: written whole or not at all, and what became of them when not.

    file:PATH           PATH.part-PID is written, synced and renamed     a failure leaves nothing new at PATH
    file:PATH,offset=N  written in place and synced                      what was there before is lost
    file:DEVICE         written to: /dev/null, a FIFO; never replaced
    exec:COMMAND        the standard input of `sh -c`                    status 0 says that it has the guest

Until the rename, and until a command has ended well, nobody can start the guest: the source keeps it.
Sources: QEMU 7.2 migration/exec.c, io/channel-command.c; newer ones migration/file.c.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from vmm.errors import MigrationError
from vmm.migration.channel_types import Channel, shown_error
from vmm.migration.page_pump.native import wait_fd

__all__ = ["new_file", "old_file", "spawn"]

LAST_BREATH_MS = 1000
"""How long a command may take to end that stopped reading, or that nobody reads any more; arbitrary."""


# ---- files ----


class _WrittenFile(Channel):
    """A device or FIFO, or a file that is written in place: what was written is there at once."""

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(-1, fd, False, f"file '{path}'")
        self._path = path

    def explain(self, error: BaseException, written_bytes: int) -> BaseException:
        return shown_error(error, self.name, written_bytes)


class _FileInPlace(_WrittenFile):
    """The file is the user's, with other things in it: neither cut off nor removed after a failure."""

    is_withheld = True  # a reader that does not wait for the end of the command is on its own

    def finish(self, cancel_fd: int = -1) -> None:
        try:
            os.fsync(self.write_fd)
        except OSError as error:
            raise OSError(error.errno, f"Unable to sync {self.name}: {error.strerror}") from error


class _NewFile(_FileInPlace):
    """Appears under its name when it is whole."""

    def __init__(self, path: str) -> None:
        self._partial = f"{path}.part-{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        super().__init__(os.open(self._partial, flags, 0o600), path)

    def publish(self) -> None:
        os.rename(self._partial, self._path)
        _sync_folder(self._path)

    def abort(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._partial)


def new_file(path: str, offset: int) -> Channel:
    """For writing. Raises OSError."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        return _WrittenFile(_open(path, os.O_WRONLY, offset), path)
    if offset:  # as newer QEMU does
        return _FileInPlace(_open(path, os.O_WRONLY | os.O_CREAT, offset), path)
    return _NewFile(path)


def old_file(path: str, offset: int) -> Channel:
    """For reading. Raises OSError."""
    return Channel(_open(path, os.O_RDONLY, offset), -1, False, f"file '{path}'")


def _open(path: str, flags: int, offset: int) -> int:
    """Never waits: a FIFO without a peer would keep the QMP command for ever."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd


def _sync_folder(path: str) -> None:
    """So that the rename outlives a crash of the host. Not to be had everywhere, and no reason to fail."""
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- commands ----


class _Command(Channel):
    """`sh -c COMMAND`, in a process group of its own, so that all of a pipeline can be ended."""

    def __init__(self, child: subprocess.Popen[bytes], fd: int, command: str, *, for_write: bool) -> None:
        super().__init__(-1 if for_write else fd, fd if for_write else -1, False, f"command '{command}'")
        self._child = child
        self.is_withheld = for_write

    def finish(self, cancel_fd: int = -1) -> None:
        """A writer's command must end with status 0; a reader's is ended when it does not end by itself."""
        self.close()
        if not self.is_withheld:
            if not self._wait(cancel_fd, LAST_BREATH_MS):
                self.abort()
            return
        self._wait(cancel_fd, -1)
        if self._child.returncode:
            raise MigrationError(f"The {self.name} {self._end()}")

    def abort(self) -> None:
        # Killed before the pipe is closed: what it has must not look whole to it.
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self.close()
        self._child.wait()

    def explain(self, error: BaseException, written_bytes: int) -> BaseException:
        """Who does not read any more has mostly ended: how, says more than "Broken pipe"."""
        if not isinstance(error, BrokenPipeError):
            return shown_error(error, self.name, written_bytes)
        if self._wait(-1, LAST_BREATH_MS):
            return MigrationError(f"The {self.name} {self._end()} after {written_bytes} bytes: Broken pipe")
        text = f"The {self.name} does not read any more after {written_bytes} bytes: Broken pipe"
        return MigrationError(text)

    def _wait(self, cancel_fd: int, timeout_ms: int) -> bool:
        """Until it has ended; False after the time. Raises Cancelled."""
        if self._child.poll() is not None:
            return True
        pidfd = os.pidfd_open(self._child.pid)
        try:
            ended = wait_fd(pidfd, cancel_fd, timeout_ms)
        finally:
            os.close(pidfd)
        if ended:
            self._child.wait()
        return ended

    def _end(self) -> str:
        status = self._child.returncode
        if status >= 0:
            return f"ended with status {status}"
        return f"was ended by signal {-status} ({signal.strsignal(-status)})"


def spawn(command: str, *, for_write: bool) -> Channel:
    """Start it. Raises OSError."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)[:: -1 if for_write else 1]
    try:
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=theirs if for_write else subprocess.DEVNULL,
            stdout=None if for_write else theirs,
            process_group=0,
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    os.set_blocking(ours, False)
    return _Command(child, ours, command, for_write=for_write)
