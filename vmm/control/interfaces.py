"""What the handlers need of the machine and of the migration stack; the tests' fakes fit these too.

Every method returns at once or within the few milliseconds its parameter allows: it is called on the loop's
thread. Errors are `vmm.errors.PageferryError`; their text goes to the client as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol
from uuid import UUID

from vmm.vmstate import Values

__all__ = [
    "CharBackend",
    "FdTaker",
    "MachineControl",
    "MigratorControl",
    "Notify",
    "RamBackend",
    "RamBlockView",
    "RamControl",
]

Notify = Callable[[str, dict[str, Any]], None]
"""QMP event name and data; called on any thread."""


class CharBackend(Protocol):
    """What a human monitor writes to. It calls `backend_writable` when it takes more again."""

    def write_nowait(self, data: bytes) -> int:
        """Take as many bytes as there is room for and give their number; never waits."""

    def accept_input(self) -> None:
        """Input that was held back may come."""


class FdTaker(Protocol):
    """The descriptors that the client passed and named."""

    def take(self, name: str) -> int:
        """The descriptor of that name; the caller owns it from now on."""


class RamBlockView(Protocol):
    """One block of guest RAM, as the checks read it."""

    @property
    def name(self) -> str: ...
    @property
    def length_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """A copy; raises an error for a page that has not been received."""

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether it holds zeroes only; raises as `read`."""


class RamControl(Protocol):
    """Guest RAM."""

    @property
    def blocks(self) -> Sequence[RamBlockView]: ...
    @property
    def regions(self) -> Sequence[tuple[int, int]]:
        """Where the guest sees RAM: (guest physical address, length)."""

    def read(self, guest_address: int, length: int) -> bytes:
        """A copy of guest memory; raises an error where there is no RAM."""


class RamBackend(Protocol):
    """One block of guest RAM."""

    @property
    def length_bytes(self) -> int: ...


class MachineConfigView(Protocol):
    """The part of the configuration that queries show."""

    @property
    def name(self) -> str | None: ...
    @property
    def uuid(self) -> UUID | None: ...
    @property
    def ram(self) -> Sequence[RamBackend]: ...


class DiskView(Protocol):
    """A disk as query-block shows it."""

    @property
    def id(self) -> str: ...
    @property
    def qom_path(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def length_bytes(self) -> int: ...
    @property
    def write_cache(self) -> bool: ...


class MachineControl(Protocol):
    """The machine as the control side drives it."""

    @property
    def config(self) -> MachineConfigView: ...
    @property
    def ram(self) -> RamControl:
        """Guest RAM."""

    @property
    def run_state(self) -> str:
        """QEMU's name of the run state."""

    @property
    def vcpu_is_paused(self) -> bool:
        """Has the vCPU acknowledged that it is stopped?"""

    def add_listener(self, notify: Notify) -> None:
        """Be told of STOP, RESUME, SHUTDOWN, RESET and GUEST_PANICKED."""

    on_hand_over_soon: Callable[[], None]
    """Called a few ms before the guest changes hands, on any thread: events can wait for so long."""

    def cont(self) -> None:
        """Let the guest run."""

    def stop(self, *, wait_s: float | None = None) -> bool:
        """Stop the guest; whether the vCPU acknowledged in that time. STOP is emitted in any case."""

    def reset(self, cause: str) -> None:
        """Reset the machine; `cause` is QEMU's ShutdownCause."""

    def press_power_button(self) -> None:
        """Tell the guest by ACPI, if it has that."""

    def inject_nmi(self) -> None:
        """Interrupt the vCPU, whatever it does."""

    def vcpu_held(self, wait_s: float) -> AbstractContextManager[Values]:
        """Within, the vCPU stands still; gives its state. Raises if it does not stand in that time."""

    def virtual_ranges(self, address: int, length: int, wait_s: float) -> list[tuple[int, int]]:
        """Where in guest physical memory these bytes are: (address, length). Raises where nothing is."""

    def request_shutdown(self, cause: str, guest: bool) -> None:
        """Emit SHUTDOWN and end the process soon."""


class MigratorControl(Protocol):
    """The migration stack as the control side drives it; texts and shapes are those of QEMU 7.2."""

    @property
    def results(self) -> Mapping[tuple[str, str], int]:
        """How many migrations have ended, by role and last status."""

    def migrate(
        self,
        uri: str,
        *,
        resume: bool = False,
        blk: bool = False,
        inc: bool = False,
        fds: FdTaker | None = None,
    ) -> None:
        """Start a migration, or resume a paused one."""

    def incoming(self, uri: str, *, exit_on_error: bool | None = None, fds: FdTaker | None = None) -> None:
        """Wait for a guest; with `exit_on_error` the process ends when an attempt fails."""

    def cancel(self) -> None: ...
    def start_postcopy(self) -> None: ...
    def continue_(self, state: str) -> None: ...
    def pause(self) -> None: ...
    def recover(self, uri: str, *, fds: FdTaker | None = None) -> None: ...
    def take_back(self) -> None: ...
    def query(self) -> dict[str, Any]: ...
    def waited_page(self) -> tuple[str, int, bool] | None:
        """A page that somebody waits for: RAMBlock, offset in bytes, and whether its source is lost."""

    def query_capabilities(self) -> list[dict[str, Any]]: ...
    def set_capabilities(self, capabilities: list[dict[str, Any]]) -> None: ...
    def query_parameters(self) -> dict[str, Any]: ...
    def set_parameters(self, parameters: dict[str, Any]) -> None: ...
