"""virtio-console: the bus of 31 ports that QEMU has, with one port, a console, on a character backend.

    queue 0  input      guest <-- pending <-- backend (loop's thread)       queue 2  control to the guest
    queue 1  output     guest --> backend; full: the request is held        queue 3  control from the guest
    queue 4, 5 ...      the other ports, which are not there: output is dropped

No more input is taken from the backend than the driver has given buffers for, and what was taken is stored
before the device is idle, so that none is lost when the guest moves. A request whose bytes the backend has
taken in part travels with its position.

Sources: Virtual I/O Device (VIRTIO) 1.1, 5.3 "Console Device"; queue sizes, control messages and section as
in QEMU 7.2 (hw/char/virtio-serial-bus.c, hw/char/virtio-console.c).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from vmm.devices.char_sink import CharSink, NullSink
from vmm.devices.virtio.device import ISR_QUEUE, VirtioDevice
from vmm.devices.virtio.element import ELEMENT_BYTES, decode_element, encode_element
from vmm.devices.virtio.ring import Chain, gather, length_of, scatter
from vmm.errors import VMStateError
from vmm.ram import GuestRam

__all__ = ["VirtioConsole"]

PORTS = 31
DATA_SIZE, CONTROL_SIZE = 128, 32
INPUT, OUTPUT, CONTROL_IN, CONTROL_OUT = range(4)
F_MULTIPORT, F_EMERG_WRITE = 1 << 1, 1 << 2
CONFIG = struct.Struct("<HHII")
EMERGENCY_OFFSET = 8
CONTROL = struct.Struct("<IHH")
DEVICE_READY, PORT_ADD, PORT_READY, CONSOLE_PORT, PORT_OPEN = 0, 1, 3, 4, 6
OUTPUT_BYTES = 4096
INPUT_BYTES = 4096
"""Arbitrary: how much is taken from the backend at once, and into it."""
STEP_BYTES = 1 << 16
"""Arbitrary: how much of a request is written before others get their turn."""
OWN = struct.Struct(">HHIIIIBBI")
HELD = struct.Struct(">IQ")


class VirtioConsole(VirtioDevice):
    """The backend calls `can_receive`, `receive` and `backend_writable` on the loop's thread."""

    kind = "virtio-console"
    device_id = 3
    section_version = 3
    own_features = F_MULTIPORT | F_EMERG_WRITE

    def __init__(self, ram: GuestRam) -> None:
        sizes = [DATA_SIZE, DATA_SIZE, CONTROL_SIZE, CONTROL_SIZE, *[DATA_SIZE] * (2 * PORTS - 2)]
        super().__init__(ram, sizes)
        self.sink: CharSink = NullSink()
        self._input = threading.Lock()  # protects the next two; nothing waits under it
        self._pending = bytearray()
        self._room = 0
        self.device_reset()

    def device_reset(self) -> None:
        self._open = False
        self._held: Chain | None = None
        self._held_offset = 0
        with self._input:
            self._pending.clear()
            self._room = 0

    def config(self) -> bytes:
        return CONFIG.pack(0, 0, PORTS, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == EMERGENCY_OFFSET:
            self.sink.write_nowait(data[:1])

    def device_ok(self) -> None:
        if not self.features & F_MULTIPORT:
            self._open = True

    # ---- the vCPU's thread, under the lock

    def notified(self, index: int) -> None:
        if index == OUTPUT:
            self._transmit()
        elif index == CONTROL_OUT:
            self._control()
        elif index == INPUT:
            self.request_work()
        elif index % 2:
            self._drop(index)

    def _transmit(self) -> None:
        queue, tell = self.queues[OUTPUT], False
        for _ in range(queue.size):
            if self._held is None:
                self._held, self._held_offset = queue.pop(), 0
            if self._held is None or not self._send_held(self._held):
                break
            tell = queue.push(self._held, 0) or tell
            self._held = None
        else:
            self.request_work()
        if tell:
            self.interrupt(ISR_QUEUE)

    def _send_held(self, held: Chain) -> bool:
        """True when all of the request is out. A long one goes on by the worker: the vCPU is not held."""
        length = length_of(held.readable)
        end = self._held_offset + STEP_BYTES
        while self._held_offset < length:
            if self._held_offset >= end:
                self.request_work()
                return False
            data = gather(self.ram, held.readable, self._held_offset, OUTPUT_BYTES)
            taken = self.sink.write_nowait(data)
            self._held_offset += taken
            if taken < len(data):
                return False
        return True

    def _drop(self, index: int) -> None:
        tell = False
        for _ in range(self.queues[index].size):
            chain = self.queues[index].pop()
            if chain is None:
                break
            tell = self.queues[index].push(chain, 0) or tell
        if tell:
            self.interrupt(ISR_QUEUE)

    def _control(self) -> None:
        queue, tell = self.queues[CONTROL_OUT], False
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            message = gather(self.ram, chain.readable, 0, CONTROL.size)
            tell = queue.push(chain, 0) or tell
            if len(message) == CONTROL.size:
                self._obey(*CONTROL.unpack(message))
        if tell:
            self.interrupt(ISR_QUEUE)

    def _obey(self, port: int, event: int, value: int) -> None:
        if event == DEVICE_READY and value:
            self._tell(PORT_ADD, 1)
        elif event == PORT_READY and value and port == 0:
            self._tell(CONSOLE_PORT, 1)
            self._tell(PORT_OPEN, 1)
        elif event == PORT_OPEN and port == 0:
            self._open = bool(value)
            self.request_work()

    def _tell(self, event: int, value: int) -> None:
        """A control message of port 0; dropped, as by QEMU, if the driver has given no buffer."""
        chain = self.queues[CONTROL_IN].pop()
        if chain is not None:
            written = scatter(self.ram, chain.writable, 0, CONTROL.pack(0, event, value))
            if self.queues[CONTROL_IN].push(chain, written):
                self.interrupt(ISR_QUEUE)

    # ---- the backend; the loop's thread

    def can_receive(self) -> int:
        """How many bytes the driver has room for."""
        with self._input:
            return 0 if self.paused else max(0, self._room - len(self._pending))

    def receive(self, data: bytes) -> None:
        """Input."""
        with self._input:
            self._pending += data
        self.request_work()

    def backend_writable(self) -> None:
        """There is room in the backend's queue again."""
        self.request_work()

    # ---- the worker's thread

    def _work(self) -> bool:
        if self.is_live and self._pending:  # also while paused: it was taken from the backend
            self.guard(self._store_input)
        return super()._work()

    def process(self) -> bool:
        for work in (self._control, self._transmit, self._store_input):
            self.guard(work)
        self.sink.accept_input()
        return False

    def _store_input(self) -> None:
        """Into the driver's buffers; then count how much they still hold."""
        queue, tell = self.queues[INPUT], False
        if not self._open:
            return
        while self._pending and (chain := queue.pop()):
            with self._input:
                data = bytes(self._pending[: length_of(chain.writable)])
                del self._pending[: len(data)]
            tell = queue.push(chain, scatter(self.ram, chain.writable, 0, data)) or tell
        if tell:
            self.interrupt(ISR_QUEUE)
        room = 0
        for chain in queue.waiting():
            room += length_of(chain.writable)
            if room >= INPUT_BYTES:
                break
        if not room:
            _ = queue.is_empty  # asks to be told of the next buffer
        with self._input:
            self._room = min(room, INPUT_BYTES) + len(self._pending)

    # ---- what travels

    def save_own(self) -> bytes:
        held = self._held
        own = OWN.pack(0, 0, PORTS, 1, 1, 0, self._open, True, held is not None)
        if held is None:
            return own
        index, rest = 0, self._held_offset
        while index < len(held.readable) and rest >= held.readable[index][1]:
            rest -= held.readable[index][1]
            index += 1
        return own + HELD.pack(index, rest) + encode_element(held)

    def read_own(self, read: Callable[[int], bytes]) -> None:
        *_, has_held = OWN.unpack(read(OWN.size))
        if has_held:
            read(HELD.size + ELEMENT_BYTES)

    def load_own(self, read: Callable[[int], bytes]) -> None:
        _, _, ports, ports_map, count, port, is_open, _, has_held = OWN.unpack(read(OWN.size))
        if (ports, ports_map, count, port) != (PORTS, 1, 1, 0) or has_held > 1:
            got = f"{count} of {ports} ports, map {ports_map:#x}, first {port}"
            raise VMStateError("Other ports than ours", self.kind, expected="port 0 of 31", got=got)
        self._open = bool(is_open)
        self._held = None
        if has_held:
            index, rest = HELD.unpack(read(HELD.size))
            held = decode_element(read(ELEMENT_BYTES), self.ram, self.queues[OUTPUT].generation)
            offset = length_of(held.readable[:index]) + rest
            if index > len(held.readable) or offset > length_of(held.readable):
                raise VMStateError("Impossible position", self.kind, got=(index, rest))
            self._held, self._held_offset = held, offset
