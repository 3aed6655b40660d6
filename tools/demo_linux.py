"""A Debian kernel moves by postcopy while it compresses a file; its console crosses over (`make demo-linux`).

    python -m tools.demo_linux [--megabytes N]

Machine A boots the kernel (fetched by apt, unpacked, not installed) into a busybox. The guest compresses
20 MB (or N) with gzip, counts seconds on its console, and moves to machine B in the middle of it. It runs
there while most of its memory is still with A. Each line of the console shows on which machine it was said.
At the end the guest unpacks its archive and compares checksums. Exits 0 if all was well, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import re
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from typing import Any

from tools.demo_screen import figure
from tools.linux_guest import APPEND, READY, Console, kernel_options
from tools.linux_images import ImagesMissing
from tools.vm_process import VM, VmError

MEGABYTES = 20
"""How much is compressed: about half a second each."""
LIMIT_BYTES_PER_S = 16 << 20
"""Slow enough that the guest has to ask for pages."""
BEFORE_MOVE = r"tick 2\n"
DEADLINE_S = 120.0


def script(megabytes: int) -> str:
    """What the guest does."""
    return f"""
dmesg -n 1
stty -echo
echo {READY.strip()}
read go
echo "kernel  $(uname -sr), $(grep -c processor /proc/cpuinfo) processor"
seq 1 150000 > /tmp/part
for i in $(seq 1 {megabytes}); do cat /tmp/part; done > /tmp/data
echo "sha256  $(sha256sum < /tmp/data)"
(n=0; while :; do n=$((n+1)); echo "tick $n"; sleep 1; done) &
gzip -c /tmp/data > /tmp/data.gz
echo "packed  $(wc -c < /tmp/data.gz) bytes"
echo "sha256  $(gunzip -c /tmp/data.gz | sha256sum)"
echo FINISHED
while :; do sleep 3600; done
"""


class Log:
    """Prints what each machine's guest says, line by line."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown: dict[str, int] = {}
        self.lines: list[tuple[str, str]] = []

    def say(self, who: str, text: str) -> None:
        """One line; `who` is a machine, or nobody."""
        print(f"{time.monotonic() - self._began:7.2f} s  {who:<2} {'|' if who else ' '} {text}", flush=True)

    def follow(self, who: str, console: Console, *, all_of_it: bool = False) -> None:
        """Show the whole lines that are new; at the end `all_of_it`."""
        text = console.text
        begin = self._shown.get(who, 0)
        end = len(text) if all_of_it else text.rfind("\n") + 1
        for line in text[begin:end].splitlines():
            self.say(who, line + ("" if text[begin:end].endswith("\n") else " ..."))
            self.lines.append((who, line))
        self._shown[who] = max(begin, end)


class DemoLinux:
    """The scenario."""

    def __init__(self, folder: pathlib.Path, megabytes: int = MEGABYTES) -> None:
        self._folder = folder
        self._options = ["-M", "microvm", *kernel_options(script(megabytes), APPEND + " loglevel=2")]
        self.log = Log()
        self.consoles: dict[str, Console] = {}

    async def machine(self, stack: AsyncExitStack, name: str, *options: str) -> VM:
        """One machine, started, with its console."""
        console = await stack.enter_async_context(Console(self._folder / name))
        self.consoles[name] = console
        more = ("-m", "256M", *options)
        return await stack.enter_async_context(VM(name, *self._options, *more, serial=console.option))

    async def wait(self, name: str, pattern: str) -> None:
        """Show what the guest says there until it says that."""
        console = self.consoles[name]
        async with asyncio.timeout(DEADLINE_S):
            while not re.search(pattern, console.text):
                await asyncio.sleep(0.05)
                self.log.follow(name, console)
        self.log.follow(name, console)

    async def run(self) -> bool:
        """The whole demo; True if all was well."""
        async with AsyncExitStack() as stack:
            first = await self.machine(stack, "A")
            self.log.say("", f"machine A boots the kernel (process {first.pid})")
            await self.wait("A", READY)
            self.consoles["A"].write("go\n")
            await self.wait("A", BEFORE_MOVE)
            second = await self.machine(stack, "B", "-incoming", "defer")
            self.log.say("", f"machine B waits for it (process {second.pid}); postcopy begins")
            await self.move(first, second)
            reply, there = await first.qmp("query-migrate"), await second.qmp("query-migrate")
            self.log.say("", self.summary(reply, there))
            await first.close()
            await self.wait("B", r"FINISHED\n")
            await self.wait("B", r"tick \d+\n")  # one that B said alone: its pages may have come last of all
        return self.judge(reply)

    async def move(self, source: VM, destination: VM) -> None:
        """Postcopy, with both consoles shown meanwhile."""
        for machine in (source, destination):
            await machine.set_capabilities(events=True, postcopy_ram=True)
        limits = {"max_bandwidth": LIMIT_BYTES_PER_S, "max_postcopy_bandwidth": LIMIT_BYTES_PER_S}
        await source.qmp("migrate-set-parameters", **limits)
        uri = f"unix:{destination.folder / 'migration'}"
        await destination.qmp("migrate-incoming", uri=uri)
        await source.qmp("migrate", uri=uri)
        await source.wait_migration("active")
        await source.qmp("migrate-start-postcopy")
        await destination.wait_run_state("running")
        self.log.follow("A", self.consoles["A"], all_of_it=True)
        self.log.say("", "the guest runs on B; its memory follows")
        while (status := (await source.qmp("query-migrate"))["status"]) == "postcopy-active":
            self.log.follow("B", self.consoles["B"])
            await asyncio.sleep(0.05)
        if status != "completed":
            raise VmError(f"The migration ended as {status}:\n{source.messages()}")
        await destination.wait_migration()

    def summary(self, source: dict[str, Any], destination: dict[str, Any]) -> str:
        """The move in one line."""
        return (
            f"all of it is on B: {figure(source, 'total-time', unit='ms')}, "
            f"downtime {figure(source, 'downtime', unit='ms')}, "
            f"{figure(destination, 'x-fault-latency', 'count')} faults, "
            f"median {figure(destination, 'x-fault-latency', 'median', unit='us', per=1000)}"
        )

    def judge(self, reply: dict[str, Any]) -> bool:
        """Compare the checksums, and see that no tick is missing."""
        said = "".join(self.consoles[name].text for name in ("A", "B"))
        sums = re.findall(r"sha256  ([0-9a-f]{64})", said)
        ticks = [int(number) for number in re.findall(r"tick (\d+)\n", said)]
        checks = [
            (len(sums) == 2 and sums[0] == sums[1], "the checksum before equals the one after"),
            (ticks == list(range(1, len(ticks) + 1)), f"no tick of {len(ticks)} is lost or doubled"),
            (reply["ram"]["postcopy-requests"] > 0, "the guest ran on B while pages were still on A"),
        ]
        for held, text in checks:
            self.log.say("", f"{'ok  ' if held else 'FAIL'}  {text}")
        return all(held for held, _ in checks)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_linux", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help=f"default {MEGABYTES}, at least 5")
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="pageferry-demo-") as folder:
            return 0 if asyncio.run(DemoLinux(pathlib.Path(folder), chosen.megabytes).run()) else 1
    except (VmError, ImagesMissing, TimeoutError) as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
