"""What all virtio devices share: features, status, queues, interrupts, and the rules of stop and reset.

    vCPU's thread    the transport's registers --> notified(queue)
    worker thread    process() --> pop, do the work without the lock, push, interrupt

Rules:
1. `lock` covers status, features, queues and the interrupt bits. It may be held while a page is waited for;
   so the loop's thread never takes it.
2. While `paused` no request is begun; one that was begun is ended, and `wait_idle` waits for that. So after
   it nothing writes to RAM, and what travels holds no request under way. `resume` looks at all queues.
3. A driver that breaks a rule of the ring gets DEVICE_NEEDS_RESET and a configuration interrupt; the device
   does nothing more until it is reset. The VMM goes on.

Source: Virtual I/O Device (VIRTIO) 1.1, 2.1 "Device Status Field", 3.1 "Device Initialization".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from vmm.devices.virtio.ring import RingError, Virtqueue
from vmm.devices.virtio.worker import Worker
from vmm.ram import GuestRam, RamError

__all__ = ["RING_FEATURES", "VirtioDevice"]

log = logging.getLogger(__name__)

S_ACKNOWLEDGE, S_DRIVER, S_DRIVER_OK, S_FEATURES_OK, S_NEEDS_RESET, S_FAILED = 1, 2, 4, 8, 0x40, 0x80
ISR_QUEUE, ISR_CONFIG = 1, 2
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1


class VirtioDevice:
    """Base of the devices. `kind` is the name in the stream, `device_id` what the driver looks for."""

    kind: ClassVar[str]
    device_id: ClassVar[int]
    section_version: ClassVar[int] = 1
    own_features: int = 0

    def __init__(self, ram: GuestRam, queue_sizes: list[int]) -> None:
        self.ram = ram
        self.lock = threading.RLock()
        self.queues = [Virtqueue(ram, size) for size in queue_sizes]
        self.set_irq: Callable[[bool], None] = lambda level: None
        self.paused = True
        self._resetting = False
        self._worker = Worker(self.kind, self._work)
        self._clear()

    def _clear(self) -> None:
        self.status = self.isr = 0
        self.features = 0
        self.broken = False

    @property
    def offered(self) -> int:
        """All feature bits."""
        return RING_FEATURES | self.own_features

    @property
    def is_live(self) -> bool:
        """Is the driver ready, and did it break nothing?"""
        return bool(self.status & S_DRIVER_OK) and not self.broken

    @property
    def may_begin(self) -> bool:
        """May a request be begun?"""
        return self.is_live and not self.paused and not self._resetting

    # ---- for the transport; the vCPU's thread

    def accept_features(self, features: int) -> bool:
        """FEATURES_OK: can the device work with these?"""
        if features & ~self.offered or not features & F_VERSION_1:
            log.info("%s: the driver wants features %#x of %#x", self.kind, features, self.offered)
            return False
        self.features = features
        for queue in self.queues:
            queue.event_idx = bool(features & F_EVENT_IDX)
        return True

    def notify(self, index: int) -> None:
        """The driver has put something into a queue."""
        if self.may_begin and index < len(self.queues) and self.queues[index].ready:
            self.guard(lambda: self.notified(index))

    def guard(self, function: Callable[[], Any]) -> Any:
        """Call `function` under the lock; a broken ring breaks the device. None then."""
        with self.lock:
            try:
                return function()
            except (RingError, RamError) as error:
                self.fail(str(error))
                return None

    def fail(self, text: str) -> None:
        """The driver did something that cannot be; under the lock."""
        log.warning("%s: the guest's driver is wrong: %s", self.kind, text)
        self.broken = True
        self.status |= S_NEEDS_RESET
        self.interrupt(ISR_CONFIG)

    def interrupt(self, bits: int) -> None:
        """Tell the driver; under the lock."""
        self.isr |= bits
        self.set_irq(True)

    def acknowledge(self, bits: int) -> None:
        """The driver has seen these; under the lock."""
        self.isr &= ~bits
        self.set_irq(bool(self.isr))

    def reset(self) -> None:
        """As after power-on. Waits for the request under way."""
        self._resetting = True
        self._worker.wait_idle(None)
        with self.lock:
            self._clear()
            for queue in self.queues:
                queue.reset()
            self.device_reset()
            self.set_irq(False)
        self._resetting = False

    # ---- stop and go; any thread

    def pause(self) -> None:
        """Begin no request any more. Does not wait."""
        self.paused = True

    def resume(self) -> None:
        """Begin requests again, also those that came meanwhile. Does not wait."""
        self.paused = False
        self.request_work()

    def wait_idle(self, timeout_s: float | None) -> bool:
        """After `pause`: has the request under way ended?"""
        return self._worker.wait_idle(timeout_s)

    def request_work(self) -> None:
        """Have `process` called on the worker's thread. Any thread; does not wait."""
        self._worker.request()

    def close(self, timeout_s: float | None) -> bool:
        """End the worker's thread."""
        self.paused = True
        return self._worker.close(timeout_s)

    def _work(self) -> bool:
        return self.may_begin and self.process()

    # ---- what a device adds

    def config(self) -> bytes:
        """The configuration space."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space; under the lock."""

    def notified(self, index: int) -> None:
        """See `notify`; under the lock, on the vCPU's thread. Raises RingError."""
        self.request_work()

    def process(self) -> bool:
        """On the worker's thread, without the lock: one step; True if there is more to do."""
        return False

    def device_ok(self) -> None:
        """DRIVER_OK was set; under the lock."""

    def device_reset(self) -> None:
        """The device's own state as after power-on; under the lock."""

    def save_own(self) -> bytes:
        """What the device adds to its section."""
        return b""

    def read_own(self, read: Callable[[int], bytes]) -> None:
        """Read as many bytes as `save_own` of a peer has written, and believe none of them.

        Raises VMStateError where their number cannot be known.
        """

    def load_own(self, read: Callable[[int], bytes]) -> None:
        """Take over what `read_own` has read, with everything else in place. Raises VMStateError."""

    def load_config(self, data: bytes) -> None:
        """Take over what of the configuration space the driver may have written."""
