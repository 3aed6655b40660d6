"""The demo as a stranger runs it: its verdict, its exit status, and nothing left after Ctrl-C."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.support.requires import requires

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DEMO_DEADLINE_S = 60
"""What the README promises."""


def start(*options: str, module: str = "tools.demo") -> subprocess.Popen[str]:
    """The demo in a process group of its own, its output in a pipe."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", sys.executable, "-W", "error", "-m", module, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_demo_finds_all_well_and_writes_plain_lines() -> None:
    requires("uffd")
    with start() as demo:
        output, _ = demo.communicate(timeout=DEMO_DEADLINE_S)
    assert demo.returncode == 0, output
    assert "\x1b" not in output
    assert "All well" in output
    assert "65,536 pages compared byte for byte: equal" in output
    requested = re.search(r"^pages requested +(\S+) +(\S+)$", output, re.MULTILINE)
    assert requested is not None, output
    assert requested[1] == "0", output
    assert int(requested[2].replace(",", "")) > 0, output


@pytest.mark.slow
def test_the_linux_demo_finds_all_well() -> None:
    requires("uffd")
    requires("linux")
    with start("--megabytes", "8", module="tools.demo_linux") as demo:
        output, _ = demo.communicate(timeout=2 * DEMO_DEADLINE_S)
    assert demo.returncode == 0, output
    assert re.search(r" A  \| tick 2$", output, re.MULTILINE), output
    assert re.search(r" B  \| tick \d+$", output, re.MULTILINE), output
    assert len(re.findall(r" ok    ", output)) == 3, output


@pytest.mark.parametrize("options", [(), ("--stock",)], ids=["pageferry", "stock"])
def test_ctrl_c_leaves_nothing_behind(options: tuple[str, ...]) -> None:
    requires("uffd")
    if options:
        requires("qemu")
    with start(*options) as demo:
        assert demo.stdout is not None
        first = demo.stdout.readline()
        match = re.search(r"process (\d+)", first)
        assert match is not None, first + demo.stdout.read()
        os.killpg(demo.pid, signal.SIGINT)
        output = demo.stdout.read()
        assert demo.wait(DEMO_DEADLINE_S) == 1, output
    assert output.endswith("Interrupted.\n"), output
    with pytest.raises(ProcessLookupError):
        os.kill(int(match[1]), 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(demo.pid, 0)
