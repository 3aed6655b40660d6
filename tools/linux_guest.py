"""A Linux guest as the tests, the demo and the benchmark use it: its command line, its script, its console.

The script that runs as /init says READY and then takes lines from the console as a shell does, each answered
by `DONE` and the line's exit status. So a machine booted once, its state saved in a file, serves many tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import Callable

from tools import linux_images
from tools.vm_process import VmError

__all__ = ["APPEND", "READY", "SHELL", "Console", "kernel_options"]

APPEND = "console=ttyS0 panic=-1 reboot=k quiet tsc=reliable"
"""tsc=reliable: a host that is busy for a tenth of a second does not make Linux doubt its clock."""
MEMORY_MIB = 128
READY = "READY\n"
SHELL = f"""
dmesg -n 1
stty -echo
count() {{ n=0; while :; do n=$((n+1)); echo "S $n"; usleep 20000; done }}
work() {{
    rm -f /tmp/f*
    i=0
    while [ $i -lt $1 ]; do
        i=$((i+1))
        seq $((i*7)) $((i*7+4000)) > /tmp/f$((i%8))
        sum=$(cat /tmp/f* | gzip -c | sha256sum)
        back=$(gzip -c /tmp/f$((i%8)) | gunzip -c | awk '{{s+=$1*$1%7}} END {{print s}}')
        echo "T $i ${{sum%% *}} $back"
    done
}}
echo {READY.strip()}
while read -r line; do eval "$line"; echo "DONE $?"; done
"""
"""`work N` forks and computes in N rounds, the same each time; `count` ticks until it is killed."""


def kernel_options(script: str = SHELL, append: str = APPEND, package: str = linux_images.CLOUD) -> list[str]:
    """What boots the Debian kernel, but for the machine. Raises linux_images.ImagesMissing."""
    kernel, initrd = linux_images.kernel(package), linux_images.initrd(script)
    return ["-m", f"{MEMORY_MIB}M", "-kernel", str(kernel.image), "-initrd", str(initrd), "-append", append]


class Console:
    """The far end of a serial port: listens, the machine connects (`serial=console.option`).

    What the guest says is kept in `text`, with plain line ends.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.raw = bytearray()
        self._changed = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    @property
    def option(self) -> str:
        """For -serial."""
        return f"unix:{self.path}"

    @property
    def text(self) -> str:
        """All that was said so far."""
        return self.raw.decode("latin-1").replace("\r\n", "\n")

    async def __aenter__(self) -> Console:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        with contextlib.suppress(ConnectionError):  # the machine was killed
            while data := await reader.read(1 << 16):
                self.raw += data
                self._changed.set()
        writer.close()

    def write(self, text: str) -> None:
        """Type. The machine has connected."""
        assert self._writer is not None, "no machine has connected"
        self._writer.write(text.encode())

    async def wait(self, satisfied: str | Callable[[str], bool], timeout_s: float = 40.0) -> str:
        """Wait until the text contains `satisfied`, or until that holds of it; gives the text."""
        holds = (lambda text: satisfied in text) if isinstance(satisfied, str) else satisfied
        try:
            async with asyncio.timeout(timeout_s):
                while not holds(text := self.text):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise VmError(
                f"{self.path.name}: the console after {timeout_s} s: {self.text[-600:]!r}"
            ) from error
        return text

    async def run(self, line: str, timeout_s: float = 40.0) -> str:
        """Have the shell run one line; gives what it said. Raises VmError if its exit status is not 0."""
        begin = len(self.text)
        self.write(line + "\n")
        text = (await self.wait(lambda text: "DONE " in text[begin:] and text.endswith("\n"), timeout_s))[
            begin:
        ]
        said, _, status = text.rpartition("DONE ")
        if status.strip() != "0":
            raise VmError(f"{line!r} ended with {status.strip()}: {said}")
        return said
