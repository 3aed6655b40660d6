"""The judges of guests, by tables: what is right, and each way in which it can be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.guest_checks import PAGE_BYTES, GuestCheckError, audit, check_dirtier, dirtier_first_bytes


@given(pages=st.integers(1, 300), steps=st.integers(0, 2000))
def test_every_state_a_dirtier_can_be_in_is_right(pages: int, steps: int) -> None:
    rounds, position = divmod(steps, pages)
    first_bytes = bytes([(rounds + 1) % 256] * position + [rounds % 256] * (pages - position))
    drop = check_dirtier(first_bytes)
    assert drop == (position or pages)


@pytest.mark.parametrize(
    ("first_bytes", "text"),
    [
        (b"", "No page"),
        (b"\5\5\6", "Page 2 has 0x06"),
        (b"\5\5\3", "Page 2 has 0x03"),
        (b"\5\4\5", "dropped once already, at page 1"),
        (b"\5\4\3", "dropped once already, at page 1"),
        (b"\5\0\5", "Page 1 has 0x00"),
    ],
)
def test_a_page_that_was_lost_or_is_old_is_named(first_bytes: bytes, text: str) -> None:
    with pytest.raises(GuestCheckError, match=text):
        check_dirtier(first_bytes)


def test_first_bytes_are_one_for_each_page() -> None:
    assert dirtier_first_bytes(b"".join(bytes([i]) + bytes(PAGE_BYTES - 1) for i in range(3))) == b"\0\1\2"


GOOD = "H 00000010\nH 00000020\n"


@pytest.mark.parametrize(
    ("outputs", "good", "rounds"),
    [
        ([GOOD], True, 0x20),
        ([GOOD, "H 00000030\n"], True, 0x30),
        (["H 000000", "10\nH 00000020\n"], True, 0x20),  # stopped in the middle of a line
        (["L 0000000000000010\n"], True, 0x10),
        ([GOOD + "H 00000"], True, 0x20),  # the guest was stopped in a line
        ([""], False, 0),  # never a heartbeat
        ([GOOD, "H 00000020\n"], False, 0x20),  # the same round twice
        ([GOOD, "H 00000010\n"], False, 0x10),  # back in time
        ([GOOD, "LOST 00101000 expected 00101000 got 00000000\n"], False, 0x20),
        ([GOOD, "STALE 00102000 expected 00000001 got 00000000\n"], False, 0x20),
        ([GOOD, "TORN 00102000 expected 00000001 got 00000000\n"], False, 0x20),
        ([GOOD, "REG xmm3 expected 0000000000000001 got 0000000000000000\n"], False, 0x20),
        ([GOOD, "X 000000000000000e error 0 at 0 address 0\n"], False, 0x20),
        ([GOOD, "E 00000002\n"], False, 0x20),
        ([GOOD, "H 000\n0H0030\n"], False, 0),  # characters out of order
    ],
)
def test_audit(outputs: list[str], good: bool, rounds: int) -> None:
    verdict = audit(*outputs)
    assert verdict.is_good is good
    assert verdict.rounds == rounds


def test_audit_keeps_the_words() -> None:
    verdict = audit(GOOD + "TORN 00102000 expected 00000001 got 00000000\nE 00000001\nwhat\n")
    assert verdict.complaints == ("TORN 00102000 expected 00000001 got 00000000",)
    assert verdict.error_count == 1
    assert verdict.strange == ("what",)
