"""Which transport a device gets, and with it which interrupt line."""

from __future__ import annotations

import pytest

from vmm.config import DeviceConfig
from vmm.devices.virtio.bus import Place, places
from vmm.errors import DeviceError

RNG = DeviceConfig("virtio-rng-device", {})


def test_the_first_has_the_last_and_none_has_the_clocks_line() -> None:
    found = places((RNG,) * 7)
    assert [place.number for place in found] == [7, 6, 5, 4, 2, 1, 0]
    assert [place.irq for place in found] == [12, 11, 10, 9, 7, 6, 5]
    assert found[0] == Place(7)
    assert found[0].address == 0xFEB00E00


def test_one_more_is_refused() -> None:
    with pytest.raises(DeviceError, match="7 virtio transports"):
        places((RNG,) * 8)
