"""Runs tests once more in a child process whose user has no privileges at all."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

__all__ = ["NOBODY", "run_pytest_unprivileged"]

ROOT = pathlib.Path(__file__).resolve().parents[2]

NOBODY = 65534
"""The user and group that owns nothing."""


def run_pytest_unprivileged(*arguments: str, timeout_s: float = 100) -> str:
    """Run pytest as NOBODY (as the present user, if that is not root) and return what it printed.

    The process begins with that user, as a VM would: one that drops root later is undumpable, and may not
    read its own pagemap. Raises AssertionError with the output if a test failed or none was run.
    """
    options = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/nonexistent",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
        **options,  # type: ignore[call-overload]  # a dict of keyword arguments has no precise type
    )
    assert done.returncode == 0, done.stdout
    return str(done.stdout)
