"""What is held comes out later, in order, once; and a full sink is waited for as ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.held_output import MOST_HELD_BYTES, HeldOutput
from vmm.devices.serial import Serial


class Sink:
    """Takes `room` bytes, then none until it has room again."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.taken = bytearray()

    def write_nowait(self, data: bytes) -> int:
        part = data[: self.room - len(self.taken)]
        self.taken += part
        return len(part)

    def accept_input(self) -> None:
        return None

    def wait_flushed(self, timeout_s: float, /) -> bool:
        return True


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from(["hold", "release", "room"]))))
def test_nothing_is_lost_doubled_or_reordered(steps: list[bytes | str]) -> None:
    sink = Sink(2)
    output = HeldOutput(sink)
    accepted = bytearray()
    holding = False
    for step in steps:
        before = len(sink.taken)
        if isinstance(step, bytes):
            accepted += step[: output.write_nowait(step)]
        elif step == "room":
            sink.room += 2
            output.flush()
        else:
            getattr(output, step)()
            holding = step == "hold"
        assert accepted.startswith(sink.taken)
        assert not holding or len(sink.taken) == before
    sink.room = 1 << 20
    output.release()
    assert sink.taken == accepted


def test_more_than_is_held_stays_in_the_device() -> None:
    sink = Sink()
    serial = Serial(sink)
    serial.hold_output()
    for _ in range(MOST_HELD_BYTES + 1):
        serial.write_port(0, 1, ord("x"))
    assert not serial.is_idle
    assert not sink.taken
    serial.release_output()
    assert serial.is_idle
    assert len(sink.taken) == MOST_HELD_BYTES + 1
