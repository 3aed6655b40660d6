"""What -msg puts before a line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tools.vm_process import ROOT
from vmm.cli import main
from vmm.messages import Heading

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z "


def test_line() -> None:
    assert Heading().line("text") == "pageferry: text"
    assert Heading(guest_name="vm 1").line("text") == "vm 1 pageferry: text"
    assert Heading(timestamp=True).line("text", 1.5) == "1970-01-01T00:00:01.500000Z pageferry: text"
    assert re.fullmatch(STAMP + "pageferry: text", Heading(timestamp=True).line("text"))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("-m 0x -msg timestamp=on", "pageferry: -m 0x: .*"),
        ("-msg timestamp=on -m 0x", STAMP + "pageferry: -m 0x: .*"),
        ("-msg timestamp=on,guest-name=on -name x -m 0x", STAMP + "x pageferry: -m 0x: .*"),
        ("-msg timestamp=on -initrd /i", STAMP + "pageferry: -initrd: .*"),
    ],
)
def test_errors_that_reject_the_command_line(
    options: str, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(options.split()) == 1
    assert re.fullmatch(pattern, capfd.readouterr().err.strip())


@pytest.mark.parametrize("how", ["-no-user-config", "-daemonize"])
def test_errors_of_the_start(how: str) -> None:
    options = f"-M none {how} -msg timestamp=on -qmp unix:/nope/x,server=on"
    done = subprocess.run(
        [sys.executable, "-m", "vmm", *options.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(STAMP + "pageferry: -qmp .*No such file or directory\n", done.stderr)
