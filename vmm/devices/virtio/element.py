"""A request that travels half done, as QEMU 7.2 sends it: the memory of its C structure.

    index u32, out_num u32, in_num u32, 4 unused, in_addr u64[1024], out_addr u64[1024],
    in_sg (pointer u64, length u64)[1024], out_sg (pointer u64, length u64)[1024]; all little-endian

Source: QEMU 7.2 hw/virtio/virtio.c (VirtQueueElementOld), as it lies in memory on x86-64.
"""

from __future__ import annotations

import struct

from vmm.devices.virtio.ring import MAX_SEGMENTS, Buffer, Chain
from vmm.errors import VMStateError
from vmm.ram import GuestRam

__all__ = ["ELEMENT_BYTES", "decode_element", "encode_element"]

HEAD = struct.Struct("<IIII")
ADDRESSES = struct.Struct(f"<{MAX_SEGMENTS}Q")
SEGMENTS = struct.Struct(f"<{2 * MAX_SEGMENTS}Q")
ELEMENT_BYTES = HEAD.size + 2 * ADDRESSES.size + 2 * SEGMENTS.size


def encode_element(chain: Chain) -> bytes:
    """The bytes; pointers are 0."""
    parts = [HEAD.pack(chain.head, len(chain.readable), len(chain.writable), 0)]
    both = (chain.writable, chain.readable)
    for buffers in both:
        parts.append(
            ADDRESSES.pack(*[address for address, _ in buffers], *[0] * (MAX_SEGMENTS - len(buffers)))
        )
    for buffers in both:
        flat = [number for _, length in buffers for number in (0, length)]
        parts.append(SEGMENTS.pack(*flat, *[0] * (2 * MAX_SEGMENTS - len(flat))))
    return b"".join(parts)


def decode_element(data: bytes, ram: GuestRam, generation: int) -> Chain:
    """Raises VMStateError for buffers that are not RAM."""
    head, out_count, in_count, _ = HEAD.unpack_from(data, 0)
    if max(out_count, in_count) > MAX_SEGMENTS:
        raise VMStateError("Impossible request", "virtio", expected=MAX_SEGMENTS, got=(out_count, in_count))
    in_addresses = ADDRESSES.unpack_from(data, HEAD.size)
    out_addresses = ADDRESSES.unpack_from(data, HEAD.size + ADDRESSES.size)
    in_lengths = SEGMENTS.unpack_from(data, HEAD.size + 2 * ADDRESSES.size)[1::2]
    out_lengths = SEGMENTS.unpack_from(data, HEAD.size + 2 * ADDRESSES.size + SEGMENTS.size)[1::2]
    readable: list[Buffer] = list(zip(out_addresses[:out_count], out_lengths, strict=False))
    writable: list[Buffer] = list(zip(in_addresses[:in_count], in_lengths, strict=False))
    for address, length in (*readable, *writable):
        if not length or not ram.contains(address, length):
            raise VMStateError("A buffer that is not RAM", "virtio", got=f"{length:#x} at {address:#x}")
    return Chain(head, readable, writable, generation)
