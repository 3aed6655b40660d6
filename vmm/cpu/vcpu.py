"""The vCPU's thread and its pause protocol.

The thread runs the engine while nobody wants it paused. Rules:

1. `request_pause` sets the engine's stop flag; the thread acknowledges by parking. Only then is the CPU state
   readable and RAM still. `wait_paused` waits for the acknowledgement, in C, kicking each millisecond.
2. A halted vCPU waits in the engine, without Python, and parks when asked. One that waits in C for a missing
   page cannot park: `wait_paused` then returns False in time, and nothing else is harmed. Who does not wait
   on calls `insist`: the vCPU parks at the end of its block, whenever that is. (No kick is lost, run.c says
   why; `insist` and `wait_paused` kick again all the same, for a stop must never depend on that.)
3. An exit other than STOPPED pauses the vCPU by itself before `on_exit` is called, on this thread.
   The vCPU counts as paused for `on_exit`, and for others when that has returned. It may call resume().
4. An exception ends the thread: `on_exit` hears of it as INTERNAL_ERROR, the vCPU parks for good, and
   `shutdown` raises the exception.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable

from vmm.cpu.engine import Engine, Exit, ExitReason
from vmm.cpu.errors import CpuError

__all__ = ["Vcpu"]

KICKS_S = 0.002
"""How long a pause that nobody waits for is kicked at a stretch, each ms; ten times as long is slept."""


def _no_exit_handler(result: Exit) -> None:
    return None


class Vcpu:
    """One vCPU thread around one engine. All methods may be called from any thread."""

    def __init__(self, engine: Engine, name: str = "vcpu") -> None:
        self.engine = engine
        self.on_exit: Callable[[Exit], None] = _no_exit_handler
        self._changed = threading.Condition()  # protects the four below
        self._pause = True
        self._closing = False
        self._parked = False
        self._in_guest = False
        self._error: BaseException | None = None
        self._insists: threading.Thread | None = None
        # A daemon: a vCPU that waits for a page that never comes must not keep the process from exiting.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start_thread(self) -> None:
        """Starts the thread, paused."""
        self._thread.start()

    def resume(self) -> None:
        """Lets the guest run; does nothing when it runs already, or when the thread has failed."""
        with self._changed:
            if self._error is not None:
                return
            self._pause = False
            self._parked = False
            self.engine.clear_stop()
            self._changed.notify_all()

    def request_pause(self) -> None:
        """Asks the vCPU to pause and returns at once."""
        with self._changed:
            self._pause = True
            self.engine.request_stop()
            self._changed.notify_all()

    def wait_paused(self, timeout_s: float | None = None) -> bool:
        """Waits until a requested pause is acknowledged; False if it was not in time (None: waits for ever).

        On the vCPU's own thread: True in on_exit, where nothing runs; CpuError in a port handler.
        """
        if threading.current_thread() is self._thread:
            if self._in_guest:
                raise CpuError("A port handler cannot wait for its own vCPU to pause")
            return True
        if self._thread.ident is None:
            return self._pause
        return self.engine.wait_parked(timeout_s)

    def insist(self) -> None:
        """Nobody waits for the pause that was requested: see that no kick is lost, in the background."""
        with self._changed:
            if self._pause and not self._closing and (self._insists is None or not self._insists.is_alive()):
                self._insists = threading.Thread(target=self._insist, name="stop", daemon=True)
                self._insists.start()

    def _insist(self) -> None:
        while not self.engine.wait_parked(KICKS_S):
            with self._changed:
                if not self._pause or self._closing or self._changed.wait_for(self._is_settled, KICKS_S * 10):
                    return

    def _is_settled(self) -> bool:
        return not self._pause or self._parked or self._closing

    @property
    def is_paused(self) -> bool:
        """The vCPU has acknowledged a pause and was not resumed since."""
        with self._changed:
            return self._parked or (self._pause and self._thread.ident is None)

    @property
    def thread_id(self) -> int:
        """The thread as the kernel knows it, 0 before it was started."""
        return self._thread.native_id or 0

    @property
    def error(self) -> BaseException | None:
        """What ended the thread, if something did."""
        return self._error

    def shutdown(self, timeout_s: float | None = None) -> bool:
        """Ends the thread and joins it; False if it did not end in time. Raises what had ended it before."""
        with self._changed:
            self._closing = True
            self._pause = True
            self.engine.request_stop()
            self._changed.notify_all()
        if self._thread.ident is not None:
            if threading.current_thread() is self._thread:
                return True
            # The kicks of wait_parked get the vCPU out of the engine; the join is short after that.
            if not self.engine.wait_parked(timeout_s):
                return False
            self._thread.join()
        if self._insists is not None:
            self._insists.join()
        if self._error is not None:
            raise self._error
        return True

    # The thread "vcpu"

    def _main(self) -> None:
        try:
            while self._wait_until_wanted():
                self._run_once()
        except BaseException as error:
            self._error = error
            with contextlib.suppress(Exception):  # it may be what raised
                self.on_exit(Exit(ExitReason.INTERNAL_ERROR, traceback.format_exc()))
        finally:
            with self._changed:
                self._pause = True
                self._park()

    def _park(self) -> None:
        self._parked = True
        self.engine.set_parked(True)

    def _wait_until_wanted(self) -> bool:
        """Parks while a pause is wanted; False when the thread shall end."""
        with self._changed:
            while self._pause and not self._closing:
                self._park()
                self._changed.wait()
            return not self._closing

    def _run_once(self) -> None:
        self._in_guest = True
        result = self.engine.run(waits=True)
        self._in_guest = False
        if result.reason is ExitReason.STOPPED:
            return
        with self._changed:
            self._pause = True
            self.engine.request_stop()
        self.on_exit(result)
