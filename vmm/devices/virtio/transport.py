"""The MMIO transport, version 2: the registers by which a driver finds and sets up one device.

    0x000 magic       0x010 device features   0x030 queue select     0x060 interrupt status
    0x004 version 2   0x014 .. select         0x034 queue size max   0x064 interrupt acknowledge
    0x008 device id   0x020 driver features   0x038 queue size       0x070 status
    0x00c vendor      0x024 .. select         0x044 queue ready      0x080 descriptors (low, high)
    0x100 configuration space                 0x050 queue notify     0x090 available, 0x0a0 used

A transport without a device has device id 0, which drivers pass over. Registers are read and written in
32 bits; other sizes read 0 and are ignored, but for the configuration space.

Sources: Virtual I/O Device (VIRTIO) 1.1, 4.2.2 "MMIO Device Register Layout"; what the specification leaves
open as in QEMU 7.2 (hw/virtio/virtio-mmio.c): a queue may have MAX_SIZE entries, addresses count once ready.
"""

from __future__ import annotations

from vmm.devices.virtio.device import S_DRIVER_OK, S_FEATURES_OK, S_NEEDS_RESET, VirtioDevice
from vmm.devices.virtio.ring import MAX_SIZE, Virtqueue

__all__ = ["MmioTransport"]

MAGIC, VERSION, VENDOR = 0x74726976, 2, 0x554D4551  # "virt", "QEMU"
CONFIG = 0x100
ADDRESSES = (0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4)


class MmioTransport:
    """Registers of one transport. Called on the vCPU's thread."""

    def __init__(self, device: VirtioDevice | None = None) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """The transport's own registers as after power-on."""
        self.device_features_select = self.driver_features_select = self.queue_select = 0
        self.driver_features = [0, 0]

    def read(self, offset: int, size: int) -> int:
        """A load at `offset` within the transport."""
        device = self.device
        if device is None:
            return {0: MAGIC, 4: VERSION, 0xC: VENDOR}.get(offset, 0) if size == 4 else 0
        if offset >= CONFIG:
            with device.lock:
                data = device.config()[offset - CONFIG : offset - CONFIG + size]
            return int.from_bytes(data, "little")
        if size != 4:
            return 0
        with device.lock:
            return self._read(device, offset)

    def _read(self, device: VirtioDevice, offset: int) -> int:
        queue = self._queue(device)
        match offset:
            case 0x00:
                return MAGIC
            case 0x04:
                return VERSION
            case 0x08:
                return device.device_id
            case 0x0C:
                return VENDOR
            case 0x10:
                select = self.device_features_select
                return device.offered >> 32 * select & 0xFFFFFFFF if select < 2 else 0
            case 0x34:
                return MAX_SIZE if queue is not None else 0
            case 0x44:
                return int(queue is not None and queue.ready)
            case 0x60:
                return device.isr
            case 0x70:
                return device.status
            case 0xB0 | 0xB4 | 0xB8 | 0xBC:
                return 0xFFFFFFFF  # there is no shared memory
        return 0

    def _queue(self, device: VirtioDevice) -> Virtqueue | None:
        return device.queues[self.queue_select] if self.queue_select < len(device.queues) else None

    def write(self, offset: int, size: int, value: int) -> None:
        """A store."""
        device = self.device
        if device is None:
            return
        if offset >= CONFIG:
            if size <= 4:
                with device.lock:
                    device.write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size == 4 and offset == 0x50:
            device.notify(value)
        elif size == 4 and offset == 0x70:
            self._write_status(device, value & 0xFF)
        elif size == 4:
            with device.lock:
                self._write(device, offset, value)

    def _write(self, device: VirtioDevice, offset: int, value: int) -> None:
        queue = self._queue(device)
        if offset == 0x14:
            self.device_features_select = value
        elif offset == 0x20 and self.driver_features_select < 2:
            self.driver_features[self.driver_features_select] = value
        elif offset == 0x24:
            self.driver_features_select = value
        elif offset == 0x30:
            self.queue_select = value & 0xFFFF if value < MAX_SIZE else MAX_SIZE
        elif offset == 0x64:
            device.acknowledge(value)
        elif queue is None:
            return
        elif offset == 0x38:
            if 0 < value <= MAX_SIZE and value & (value - 1) == 0 and not queue.ready:
                queue.size = queue.staged_size = value
        elif offset == 0x44:
            self._write_ready(device, queue, value)
        elif offset in ADDRESSES:
            queue.staged[ADDRESSES.index(offset)] = value

    def _write_ready(self, device: VirtioDevice, queue: Virtqueue, value: int) -> None:
        if not value & 1:
            queue.disable()
        elif not queue.ready:
            low_high = queue.staged
            queue.desc, queue.avail, queue.used = (low_high[n] | low_high[n + 1] << 32 for n in (0, 2, 4))
            device.guard(queue.enable)

    def _write_status(self, device: VirtioDevice, value: int) -> None:
        if not value:
            device.reset()
            self.clear()
            return
        with device.lock:
            if value & S_FEATURES_OK and not device.status & S_FEATURES_OK:
                low, high = self.driver_features
                if not device.accept_features(low | high << 32):
                    value &= ~S_FEATURES_OK
            if value & S_DRIVER_OK and not device.status & S_FEATURES_OK:
                value &= ~S_DRIVER_OK
            begins = value & S_DRIVER_OK and not device.status & S_DRIVER_OK
            device.status = value | device.status & S_NEEDS_RESET
            if begins:
                device.device_ok()
