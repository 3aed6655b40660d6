"""A virtio device on the MMIO transport in the stream: the layout of stock's virtio_save, and back.

    device_features_sel u32, driver_features_sel u32, guest_page_shift u32            the transport
    status u8, isr u8, queue_sel u16, features (low half) u32, config_len u32, config
    queue count u32; each: size u32, align u32, descriptors u64, last avail index u16
    what the device adds
    subsections: 64bit_features, virtqueues, ringsize, broken, extra_state (transport), started, disabled

Loading looks into the rings: the used index is learned from guest RAM, and that the driver's index can be. In
postcopy those pages are still at the source then; the listen thread brings them.

Source: QEMU 7.2 hw/virtio/virtio.c (virtio_save, virtio_load), hw/virtio/virtio-mmio.c; compared with
streams of stock QEMU.
"""

from __future__ import annotations

import struct
from typing import Any

from vmm.devices.virtio.device import F_EVENT_IDX, S_DRIVER_OK, VirtioDevice
from vmm.devices.virtio.ring import MAX_SIZE, RingError
from vmm.devices.virtio.transport import MmioTransport
from vmm.errors import VMStateError
from vmm.ram import RamError
from vmm.vmstate import ByteSource, Description, Field, Subsection, Values, decode, encode

__all__ = ["VirtioSection"]

ALIGN = 4096
LITTLE_ENDIAN = 1
TRANSPORT, HEAD, QUEUE = struct.Struct(">III"), struct.Struct(">BBHI"), struct.Struct(">IIQH")
RINGS = struct.Struct(f">{2 * MAX_SIZE}Q")
SIZES = struct.Struct(f">{MAX_SIZE}I")
STAGED = struct.Struct(">H?6I")


def _optional(name: str, *fields: Field) -> Subsection:
    return Subsection(Description(name, 1, 1, fields), lambda values: name in values)


_MMIO = Description(
    "virtio_mmio",
    1,
    1,
    (),
    (
        _optional(
            "virtio_mmio/state",
            Field("guest_features", "uint32", 2),
            Field("vqs", "buffer", MAX_SIZE * STAGED.size),
        ),
    ),
)
_SUBSECTIONS = Description(
    "virtio",
    1,
    1,
    (),
    (
        _optional("virtio/device_endian", Field("device_endian", "uint8")),
        _optional("virtio/64bit_features", Field("guest_features", "uint64")),
        _optional("virtio/virtqueues", Field("vqs", "buffer", RINGS.size)),
        _optional("virtio/ringsize", Field("vqs", "buffer", SIZES.size)),
        _optional("virtio/broken", Field("broken", "bool")),
        _optional("virtio/extra_state", Field("extra_state", "struct", struct=_MMIO)),
        _optional("virtio/started", Field("started", "bool")),
        _optional("virtio/disabled", Field("disabled", "bool")),
    ),
)


class _Payload:
    """The codec. To be encoded: the `head` in bytes and the subsections; decoded: everything by name."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def encode(self, value: Any) -> bytes:
        head: bytes = value["head"]
        return head + encode(_SUBSECTIONS, value)

    def decode(self, source: ByteSource) -> Values:
        device = self._device
        values: Values = {"transport": TRANSPORT.unpack(source.read(TRANSPORT.size))}
        values["device"] = HEAD.unpack(source.read(HEAD.size))
        config_bytes = int.from_bytes(source.read(4), "big")
        if config_bytes > 4096:
            raise VMStateError("Impossible length", f"{device.kind}.config", got=config_bytes)
        values["config"] = source.read(config_bytes)
        count = int.from_bytes(source.read(4), "big")
        if count != len(device.queues):
            where = f"{device.kind}.queues"
            raise VMStateError("Another number of queues", where, expected=len(device.queues), got=count)
        values["queues"] = [QUEUE.unpack(source.read(QUEUE.size)) for _ in range(count)]
        own = bytearray()

        def read(length: int) -> bytes:
            own.extend(data := source.read(length))
            return data

        device.read_own(read)
        values["own"] = bytes(own)
        values.update(decode(_SUBSECTIONS, source, 1))
        return values


class VirtioSection:
    """`virtio-mmio@ADDRESS/KIND`. Save and load with the device idle."""

    instance_id = 0

    def __init__(self, transport: MmioTransport, device: VirtioDevice, address: int) -> None:
        self._transport = transport
        self._device = device
        self.idstr = f"virtio-mmio@{address:016x}/{device.kind}"
        field = Field("virtio", "virtio", codec=_Payload(device))
        version = device.section_version
        self.description = Description(device.kind, version, version, (field,))

    def save(self) -> Values:
        device, transport = self._device, self._transport
        with device.lock:
            config = device.config()
            parts = [
                TRANSPORT.pack(transport.device_features_select, transport.driver_features_select, 0),
                HEAD.pack(
                    device.status, device.isr, transport.queue_select & 0xFFFF, device.features & 0xFFFFFFFF
                ),
                struct.pack(">I", len(config)) + config + struct.pack(">I", len(device.queues)),
            ]
            parts += [QUEUE.pack(q.size, ALIGN, q.desc, q.last_avail) for q in device.queues]
            parts.append(device.save_own())
            return {"virtio": {"head": b"".join(parts), **self._subsections()}}

    def _subsections(self) -> Values:
        device, queues = self._device, self._device.queues
        rings = b"".join(struct.pack(">QQ", q.avail, q.used) for q in queues)
        staged = b"".join(STAGED.pack(q.staged_size, q.ready, *q.staged) for q in queues)
        state = {
            "guest_features": list(self._transport.driver_features),
            "vqs": staged.ljust(MAX_SIZE * STAGED.size, b"\0"),
        }
        values: Values = {
            "virtio/64bit_features": {"guest_features": device.features},
            "virtio/virtqueues": {"vqs": rings.ljust(RINGS.size, b"\0")},
            "virtio/extra_state": {"extra_state": {"virtio_mmio/state": state}},
        }
        if any(queue.size != queue.default_size for queue in queues):
            sizes = b"".join(struct.pack(">I", queue.default_size) for queue in queues)
            values["virtio/ringsize"] = {"vqs": sizes.ljust(SIZES.size, b"\0")}
        if device.broken:
            values["virtio/broken"] = {"broken": True}
        if device.status & S_DRIVER_OK:
            values["virtio/started"] = {"started": True}
        return values

    def load(self, values: Values, version: int) -> None:
        """Raises VMStateError. May wait for the pages of the rings."""
        device = self._device
        device.reset()
        with device.lock:
            try:
                self._load(values["virtio"])
            except (RingError, RamError) as error:
                device.status = device.isr = 0
                raise VMStateError("Impossible ring", self.idstr, got=str(error)) from error
            device.set_irq(bool(device.isr))

    def _load(self, values: Values) -> None:
        device, transport = self._device, self._transport
        extra = values.get("virtio/extra_state", {}).get("extra_state", {}).get("virtio_mmio/state")
        if extra is None:
            expected = "a transport of version 2 (-global virtio-mmio.force-legacy=false)"
            raise VMStateError("A legacy transport", self.idstr, expected=expected, got="version 1")
        if values.get("virtio/device_endian", {}).get("device_endian", LITTLE_ENDIAN) != LITTLE_ENDIAN:
            raise VMStateError("A big-endian device", self.idstr, expected=LITTLE_ENDIAN)
        transport.device_features_select, transport.driver_features_select, _ = values["transport"]
        device.status, device.isr, transport.queue_select, low = values["device"]
        features = values.get("virtio/64bit_features", {}).get("guest_features", low)
        if features & ~device.offered:
            expected, got = f"{device.offered:#x}", f"{features:#x}"
            raise VMStateError("Features that are not offered", self.idstr, expected=expected, got=got)
        device.features = features
        device.broken = bool(values.get("virtio/broken", {}).get("broken", False))
        transport.driver_features = list(extra["guest_features"])
        rings = RINGS.unpack(values["virtio/virtqueues"]["vqs"])
        for index, queue in enumerate(device.queues):
            size, _, queue.desc, queue.last_avail = values["queues"][index]
            if not 0 < size <= MAX_SIZE or size & (size - 1):
                raise VMStateError("Impossible queue size", self.idstr, expected=f"1 to {MAX_SIZE}", got=size)
            queue.size = size
            queue.avail, queue.used = rings[2 * index], rings[2 * index + 1]
            queue.staged_size, ready, *queue.staged = STAGED.unpack_from(extra["vqs"], index * STAGED.size)
            queue.event_idx = bool(features & F_EVENT_IDX)
            if ready and not device.broken:
                queue.resync()
        device.load_config(values["config"])
        own = values["own"]
        position = 0

        def read(length: int) -> bytes:
            nonlocal position
            position += length
            return bytes(own[position - length : position])

        device.load_own(read)
