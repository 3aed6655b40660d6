"""The CPU engine: the only file that imports the C module, and the object that the machine uses.

The C side (engine.h) runs the guest, delivers its exceptions and answers CPUID and the TSC by itself; Python
is called for port I/O and device registers only. A handler that raises ends the run with INTERNAL_ERROR and
its traceback.

Threads: `run` belongs to the vCPU's thread. What says "any thread" may be called while it runs; everything
else raises EngineBusy then. No call holds the GIL while it waits.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmm.cpu import _engine
from vmm.cpu.cpuid import CpuModel
from vmm.cpu.errors import CpuError, EngineBusy, EngineMismatch, EngineTimeout
from vmm.cpu.state import KEPT, extract, fill, reset_values
from vmm.vmstate import Values

__all__ = ["Engine", "Exit", "ExitReason", "MmioReader", "MmioWriter", "PortReader", "PortWriter"]

ffi: Any = _engine.ffi
lib: Any = _engine.lib

PortReader = Callable[[int, int], int]
"""Called with port and size in bytes; gives the value."""

PortWriter = Callable[[int, int, int], None]
"""Called with port, size in bytes and value."""

MmioReader = Callable[[int, int], int]
"""Called with guest physical address and size in bytes (1 to 8); gives the value."""

MmioWriter = Callable[[int, int, int], None]
"""Called with guest physical address, size in bytes and value."""

PIC_REGISTERS = tuple(name for name, _ in ffi.typeof("struct pf_pic").fields)
PIT_REGISTERS = tuple(name for name, _ in ffi.typeof("struct pf_pit_channel").fields)
PIT_FLAGS = tuple(name for name, _ in ffi.typeof("struct pf_pit").fields if name != "channels")

SAFE_POINT_TIMEOUT_S = 30.0
"""Arbitrary. Longer than any block or handler takes; a vCPU parked on a missing page may never come."""

SAFE_POINT_TIMEOUT_NS = int(SAFE_POINT_TIMEOUT_S * 1e9)


class ExitReason(enum.Enum):
    """Why a run ended. Numbers as in engine.h."""

    STOPPED = 0
    HALTED = 1
    LATCHED = 2
    TRIPLE_FAULT = 3
    INTERNAL_ERROR = 4


@dataclasses.dataclass(frozen=True)
class Exit:
    """The end of a run; `text` is filled for INTERNAL_ERROR: a traceback, or what the library said."""

    reason: ExitReason
    text: str = ""


_here = threading.local()


def _handler_failed(kind: Any, error: BaseException, where: Any) -> None:
    """A port handler raised, below C: remember it on the engine that this thread runs and end the run."""
    engine: Engine = _here.engine
    engine.handler_failed("".join(traceback.format_exception(kind, error, where)))


def _on_port_read(handle: Any, port: int, size: int) -> int:
    engine: Engine = _here.engine
    return engine.read_port(port, size) & 0xFFFFFFFF


def _on_port_write(handle: Any, port: int, size: int, value: int) -> None:
    _here.engine.write_port(port, size, value)


def _on_mmio_read(handle: Any, address: int, size: int) -> int:
    engine: Engine = _here.engine
    return engine.read_mmio(address, size) & 0xFFFFFFFF_FFFFFFFF


def _on_mmio_write(handle: Any, address: int, size: int, value: int) -> None:
    _here.engine.write_mmio(address, size, value)


ffi.def_extern("pf_on_port_read", error=0xFFFFFFFF, onerror=_handler_failed)(_on_port_read)
ffi.def_extern("pf_on_port_write", onerror=_handler_failed)(_on_port_write)
ffi.def_extern("pf_on_mmio_read", error=0xFFFFFFFF_FFFFFFFF, onerror=_handler_failed)(_on_mmio_read)
ffi.def_extern("pf_on_mmio_write", onerror=_handler_failed)(_on_mmio_write)


def _open_bus(where: int, size: int) -> int:
    return 0xFFFFFFFF_FFFFFFFF


def _ignore(where: int, size: int, value: int) -> None:
    return None


def _nanoseconds(seconds: float | None) -> int:
    return -1 if seconds is None else max(0, int(seconds * 1e9))


class Engine:
    """One vCPU. RAM and ports are set up before the first run."""

    def __init__(self, model: CpuModel | None = None) -> None:
        """Raises EngineMismatch when the library is not the Unicorn whose layout we know."""
        self.model = model or CpuModel()
        self.read_port: PortReader = _open_bus
        self.write_port: PortWriter = _ignore
        self.read_mmio: MmioReader = _open_bus
        self.write_mmio: MmioWriter = _ignore
        self._failure = ""
        self._kept: Values = dict(KEPT)
        out = ffi.new("struct pf_engine **")
        mismatch = ffi.new("struct pf_mismatch *")
        names = ("port_read", "port_write", "mmio_read", "mmio_write")
        callbacks = ffi.new("struct pf_callbacks *", {name: getattr(lib, f"pf_on_{name}") for name in names})
        result = lib.pf_create(out, ffi.NULL, callbacks, mismatch)
        if result == -errno.EPROTO:
            what = ffi.string(mismatch.what).decode()
            raise EngineMismatch(
                f"This is not the Unicorn 2.1.4 that Pageferry knows: {what} is {mismatch.got:#x}, "
                f"expected {mismatch.expected:#x}",
                expected=mismatch.expected,
                got=mismatch.got,
            )
        _check(result, "open the CPU engine")
        self._engine = out[0]
        table = ffi.new("struct pf_cpuid[]", self.model.table())
        _check(lib.pf_set_cpuid(self._engine, table, len(table), self.model.translator_words()), "set CPUID")
        self.reset()

    def close(self) -> None:
        """Frees the engine; EngineBusy while the vCPU runs. Nothing may be called after it."""
        if self._engine != ffi.NULL:
            _check(lib.pf_destroy(self._engine), "close the engine")
            self._engine = ffi.NULL

    def map_ram(self, guest_address: int, host_address: int, length: int) -> None:
        """Shows `length` bytes of memory to the guest. The memory must stay mapped until close().

        Everything that is not mapped when the vCPU first runs reads as ones and loses writes, like a PC's
        open bus. CpuError if the range is not page aligned, overlaps another, or the vCPU has run.
        """
        where = f"map {length:#x} bytes of RAM at {guest_address:#x}"
        _check(lib.pf_map_ram(self._engine, guest_address, host_address, length), where)

    def map_mmio(self, guest_address: int, length: int, read: MmioReader, write: MmioWriter) -> None:
        """Device registers in whole pages. All ranges have the handlers that were given last.

        The handlers are called on the vCPU's thread, inside the run. CpuError as for map_ram.
        """
        where = f"map {length:#x} bytes of registers at {guest_address:#x}"
        _check(lib.pf_map_mmio(self._engine, guest_address, length), where)
        self.read_mmio = read
        self.write_mmio = write

    # Port I/O

    def set_port_handlers(self, read: PortReader, write: PortWriter) -> None:
        """Who answers IN and OUT. Called on the vCPU's thread, inside the run."""
        self.read_port = read
        self.write_port = write

    def set_fast_read(self, port: int, value: int) -> None:
        """Any thread. Byte reads of `port` give `value` (0..255) from now on without calling the handler."""
        _check(lib.pf_set_fast_read(self._engine, port, value), f"answer port {port:#x} with {value}")

    def clear_fast_read(self, port: int) -> None:
        """Any thread. Reads of `port` call the handler again."""
        _check(lib.pf_set_fast_read(self._engine, port, -1), f"answer port {port:#x}")

    def set_no_device(self, port: int) -> None:
        """Any thread. No device has `port`: bytes read are ones, bytes written are lost, without a call."""
        _check(lib.pf_set_no_device(self._engine, port), f"give up port {port:#x}")

    def latch(self) -> None:
        """From a port handler: the rest of this run's port I/O is dropped, and the run ends at once."""
        _check(lib.pf_latch(self._engine), "latch outside a port handler")

    def handler_failed(self, text: str) -> None:
        """From a port handler: as latch(), and the run ends with INTERNAL_ERROR and `text`."""
        self._failure = self._failure or text
        lib.pf_fail(self._engine)

    # Running

    def run(self, *, waits: bool = False) -> Exit:
        """Runs the guest on this thread until it stops. STOPPED at once while a stop is requested.

        With `waits` a halted vCPU waits inside of the run for what ends that; else the run ends with HALTED.
        """
        detail = ffi.new("int *")
        self._failure = ""
        _here.engine = self
        try:
            result = _check(lib.pf_run(self._engine, waits, detail), "run the vCPU")
        finally:
            _here.engine = None
        reason = ExitReason(result)
        if reason is not ExitReason.INTERNAL_ERROR:
            return Exit(reason)
        text = ffi.string(lib.pf_strerror(detail[0])).decode()
        return Exit(reason, self._failure or f"The CPU engine failed: {text}")

    def request_stop(self) -> None:
        """Any thread. The run ends before the next block; no later one starts until clear_stop()."""
        lib.pf_request_stop(self._engine)

    def clear_stop(self) -> None:
        """Any thread. Runs may start again."""
        lib.pf_clear_stop(self._engine)

    def set_parked(self, parked: bool) -> None:
        """The vCPU's thread: it will not run before clear_stop()."""
        lib.pf_set_parked(self._engine, parked)

    def wait_parked(self, timeout_s: float | None) -> bool:
        """Waits until the vCPU's thread has said so, kicking it each ms; False if it did not in time."""
        return bool(lib.pf_wait_parked(self._engine, _nanoseconds(timeout_s)))

    def enable_pics(self) -> None:
        """The interrupt controllers answer their ports from now on. EngineBusy once the vCPU has run."""
        _check(lib.pf_enable_pics(self._engine), "add the interrupt controllers")

    def enable_pit(self) -> None:
        """The timer answers its ports and interrupts from now on. EngineBusy once the vCPU has run."""
        _check(lib.pf_enable_pit(self._engine), "add the timer")

    def get_pit(self) -> dict[str, Any]:
        """Any thread. The timer's registers, by the names of `struct pf_pit`."""
        pit = ffi.new("struct pf_pit *")
        lib.pf_get_pit(self._engine, pit)
        channels = [{name: int(getattr(each, name)) for name in PIT_REGISTERS} for each in pit.channels]
        return {"channels": channels, **{name: int(getattr(pit, name)) for name in PIT_FLAGS}}

    def set_pit(self, registers: Mapping[str, Any]) -> None:
        """Any thread. Replaces them; pulses of its interrupt line that are kept back are forgotten."""
        lib.pf_set_pit(self._engine, ffi.new("struct pf_pit *", dict(registers)))

    def read_pit(self, port: int) -> int:
        """From a port handler: IN of one of its ports."""
        return int(lib.pf_pit_port_read(self._engine, port))

    def write_pit(self, port: int, value: int) -> None:
        """From a port handler: OUT to one of its ports."""
        lib.pf_pit_port_write(self._engine, port, value)

    def serve_ticks(self) -> None:
        """Raises the timer's interrupt while the vCPU is not halted, until end_ticks()."""
        _check(lib.pf_serve_ticks(self._engine), "wait for the timer")

    def end_ticks(self) -> None:
        """Any thread. Has serve_ticks() return."""
        lib.pf_end_ticks(self._engine)

    def enable_uart(self, port: int, irq: int) -> None:
        """A UART whose registers for output the vCPU's thread may have. EngineBusy once it has run."""
        _check(lib.pf_enable_uart(self._engine, port, irq), "add the UART")

    def take_uart(self) -> Any:
        """Any thread. The registers (`struct pf_uart`) with what the guest sent; it no longer has them."""
        uart = ffi.new("struct pf_uart *")
        lib.pf_take_uart(self._engine, uart)
        return uart

    def give_uart(self, registers: Mapping[str, int]) -> None:
        """Any thread. Lets the guest have them: `registers` has names of `struct pf_uart`."""
        lib.pf_give_uart(self._engine, ffi.new("struct pf_uart *", registers))

    def host_ns(self) -> int:
        """Any thread. The host's monotonic clock, less what was hidden from the guest (clock.c)."""
        return time.monotonic_ns() - int(lib.pf_get_hidden_ns(self._engine))

    def set_clock(self, offset_ns: int, runs: bool) -> None:
        """Any thread. The guest's clock shows `offset_ns`, and `host_ns` in addition while it runs."""
        lib.pf_set_clock(self._engine, offset_ns, runs)

    def set_irq(self, irq: int, level: bool) -> None:
        """Any thread. The level of interrupt line 0 to 15."""
        _check(lib.pf_set_irq(self._engine, irq, level), f"set interrupt line {irq}")

    def owed_irqs(self, irq: int) -> int:
        """Any thread. How many pulses are kept back."""
        return _check(lib.pf_owed_irqs(self._engine, irq), f"look at interrupt line {irq}")

    def reset_pics(self) -> None:
        """Any thread. The interrupt controllers as after power-on, all lines low; no NMI is pending."""
        lib.pf_reset_pics(self._engine)

    def get_pics(self) -> tuple[dict[str, int], dict[str, int]]:
        """Any thread. The registers of both interrupt controllers, by the names of `struct pf_pic`."""
        pics = ffi.new("struct pf_pics *")
        lib.pf_get_pics(self._engine, pics)
        first, second = ({name: int(getattr(pic, name)) for name in PIC_REGISTERS} for pic in pics.pic)
        return first, second

    def set_pics(self, first: Mapping[str, int], second: Mapping[str, int]) -> None:
        """Any thread. Replaces them; each value is 0 to 255."""
        pics = ffi.new("struct pf_pics *", {"pic": [dict(first), dict(second)]})
        lib.pf_set_pics(self._engine, pics)

    def inject_nmi(self) -> None:
        """Any thread. A non-maskable interrupt."""
        lib.pf_inject_nmi(self._engine)

    @property
    def interrupt_request(self) -> int:
        """What the CPU has yet to take, in stock's bits: 0x2 an interrupt, 0x200 an NMI."""
        return int(lib.pf_get_interrupt_request(self._engine))

    @property
    def halted(self) -> bool:
        """HLT was executed and no interrupt came since."""
        return bool(lib.pf_get_halted(self._engine))

    @halted.setter
    def halted(self, value: bool) -> None:
        _check(lib.pf_set_halted(self._engine, value), "set halted")

    # State

    def get_cpu_state(self) -> Values:
        """The whole architectural state, by the names of CPU_DESCRIPTION. EngineBusy while the vCPU runs."""
        raw = ffi.new("struct pf_cpu_state *")
        _check(lib.pf_get_state(self._engine, raw), "read the CPU state")
        return extract(raw, self._kept)

    def set_cpu_state(self, values: Values) -> None:
        """Replaces the state and drops translated code and the TLB. EngineBusy while the vCPU runs.

        Raises VMStateError for an x87 format that is not supported; then nothing was changed.
        """
        raw = ffi.new("struct pf_cpu_state *")
        kept = fill(raw, values)
        _check(lib.pf_set_state(self._engine, raw), "set the CPU state")
        self._kept = kept

    def reset(self) -> None:
        """As after power-on, interrupt controllers included; not halted. EngineBusy while running."""
        self.set_cpu_state(reset_values(self.model.cpuid_version))
        self.halted = False
        self.reset_pics()

    # Time

    def enable_ticks(self) -> None:
        """The guest's TSC goes on from where it stood (stock's cpu_enable_ticks)."""
        lib.pf_enable_ticks(self._engine)

    def disable_ticks(self) -> None:
        """The guest's TSC stands still."""
        lib.pf_disable_ticks(self._engine)

    @property
    def ticks(self) -> int:
        """The guest's TSC without env.tsc_offset: stock's cpu_get_ticks."""
        return int(lib.pf_get_ticks(self._engine))

    @property
    def cpu_ticks_offset(self) -> int:
        """What stock's `timer` section calls so: while the ticks are disabled, the TSC itself."""
        return int(lib.pf_get_ticks_offset(self._engine))

    @cpu_ticks_offset.setter
    def cpu_ticks_offset(self, value: int) -> None:
        lib.pf_set_ticks_offset(self._engine, value)

    # Memory

    def flush(self, timeout_s: float | None = SAFE_POINT_TIMEOUT_S) -> None:
        """Any thread. Drops all translated code and the TLB, at a safe point. EngineTimeout if none came."""
        _check(lib.pf_flush(self._engine, _nanoseconds(timeout_s)), "flush translated code")

    def invalidate(
        self, guest_address: int, length: int, timeout_s: float | None = SAFE_POINT_TIMEOUT_S
    ) -> None:
        """Any thread. Drops code translated from these bytes, after something else than a guest store."""
        timeout_ns = _nanoseconds(timeout_s)
        _check(lib.pf_invalidate(self._engine, guest_address, length, timeout_ns), "drop translated code")

    def start_log(self, timeout_s: float | None = SAFE_POINT_TIMEOUT_S) -> None:
        """Any thread. From now on every page that the guest stores to is logged."""
        _check(lib.pf_start_log(self._engine, _nanoseconds(timeout_s)), "start the store log")

    def aim_log(self, targets: Sequence[tuple[int, int, int, int]]) -> Any:
        """Where `collect_log` puts the log: a target for each mapped range, in the order of mapping.

        It is the range's guest address, its pages, the address of a uint64 array that the caller keeps
        alive, and which bit there is the first page.
        """
        return ffi.new("struct pf_log_target[]", targets)

    def collect_log(self, targets: Any) -> int:
        """ORs the pages stored to since the last call into bitmaps; gives the newly set bits.

        `targets` comes from `aim_log`. Any thread, but one at a time, also with `start_log` and `stop_log`.
        """
        result: int = lib.pf_collect_log(self._engine, targets, len(targets), SAFE_POINT_TIMEOUT_NS)
        return result if result >= 0 else _check(result, "collect the store log")

    def stop_log(self, timeout_s: float | None = SAFE_POINT_TIMEOUT_S) -> None:
        """Any thread. Ends the log; does nothing if there is none."""
        _check(lib.pf_stop_log(self._engine, _nanoseconds(timeout_s)), "stop the store log")

    def counters(self) -> tuple[int, int]:
        """Starts of the translator and stores that took the slow path, since the engine was made."""
        starts, stores = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.pf_counters(self._engine, starts, stores)
        return starts[0], stores[0]


def _check(result: int, what: str) -> int:
    """Turns -errno into the exception that says what could not be done."""
    if result >= 0:
        return result
    if result == -errno.EBUSY:
        raise EngineBusy(f"Cannot {what} while the vCPU runs")
    if result == -errno.ETIMEDOUT:
        raise EngineTimeout(f"Cannot {what}: the vCPU reached no safe point in time")
    raise CpuError(f"Cannot {what}: {os.strerror(-result)}")
