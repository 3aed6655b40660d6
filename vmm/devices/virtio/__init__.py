"""Virtio devices: rings in guest RAM, the MMIO transport, and what stands behind the rings."""
