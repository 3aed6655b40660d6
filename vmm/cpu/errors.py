"""The exceptions of vmm/cpu, below vmm.errors.CpuError.

CpuError
 +- EngineMismatch    the installed Unicorn is not the one whose layout we know
 +- EngineBusy        asked for something that needs a stopped vCPU while it runs
 +- EngineTimeout     the vCPU reached no safe point in the time given (parked on a missing page)
"""

from __future__ import annotations

from vmm.errors import CpuError

__all__ = ["CpuError", "EngineBusy", "EngineMismatch", "EngineTimeout"]


class EngineMismatch(CpuError):
    """A check of the engine's private layout failed: nothing was started."""


class EngineBusy(CpuError):
    """The vCPU is running; stop it first. Nothing was changed."""


class EngineTimeout(CpuError):
    """The vCPU did not reach a safe point in time. Nothing was changed."""
