"""Convergence: figures in, verdict out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.migration.converge import Decision, Figures, decide, expected_downtime_ms, outlook

D = Decision
MIB = 1 << 20


def figures(**changed: object) -> Figures:
    """100 MiB/s and 300 ms make a threshold of 30 MiB; 64 MiB remain, and nobody wants anything."""
    plain: dict[str, object] = {
        "remaining_bytes": 64 * MIB,
        "remaining_is_exact": False,
        "bandwidth_bytes_per_s": 100.0 * MIB,
        "dirty_rate_bytes_per_s": 10.0 * MIB,
        "downtime_limit_ms": 300,
        "elapsed_ms": 1000,
    }
    return Figures(**{**plain, **changed})  # type: ignore[arg-type]  # a table of keyword arguments


POSTCOPY = {"postcopy_enabled": True, "postcopy_requested": True}


@pytest.mark.parametrize(
    ("changed", "decision"),
    [
        ({}, D.ITERATE),
        ({"remaining_is_exact": True}, D.ITERATE),
        # The threshold, exactly.
        ({"remaining_bytes": 30 * MIB}, D.ITERATE),
        ({"remaining_bytes": 30 * MIB - 1}, D.SYNC),
        ({"remaining_bytes": 30 * MIB - 1, "remaining_is_exact": True}, D.SWITCH_OVER),
        # Nothing remains: whatever the limit and the bandwidth.
        ({"remaining_bytes": 0}, D.SYNC),
        ({"remaining_bytes": 0, "bandwidth_bytes_per_s": 0.0}, D.SYNC),
        ({"remaining_bytes": 0, "remaining_is_exact": True, "downtime_limit_ms": 0}, D.SWITCH_OVER),
        # Nothing measured yet, or no downtime allowed.
        ({"bandwidth_bytes_per_s": 0.0}, D.ITERATE),
        ({"remaining_bytes": 1, "downtime_limit_ms": 0}, D.ITERATE),
        # Postcopy by the user, as soon as it can be; not if the channel or the capability forbids it.
        (POSTCOPY, D.START_POSTCOPY),
        ({**POSTCOPY, "bandwidth_bytes_per_s": 0.0, "elapsed_ms": 0}, D.START_POSTCOPY),
        ({**POSTCOPY, "postcopy_enabled": False}, D.ITERATE),
        ({"postcopy_enabled": True}, D.ITERATE),
        # Not if switchover is possible anyway.
        ({**POSTCOPY, "remaining_bytes": 1}, D.SYNC),
        ({**POSTCOPY, "remaining_bytes": 1, "remaining_is_exact": True}, D.SWITCH_OVER),
        # Postcopy by the timer.
        ({"postcopy_enabled": True, "postcopy_start_time_ms": 1000}, D.START_POSTCOPY),
        ({"postcopy_enabled": True, "postcopy_start_time_ms": 1001}, D.ITERATE),
        ({"postcopy_enabled": False, "postcopy_start_time_ms": 1}, D.ITERATE),
        # Out of time; postcopy is the better way out.
        ({"give_up_after_ms": 1000}, D.GIVE_UP),
        ({"give_up_after_ms": 1001}, D.ITERATE),
        ({**POSTCOPY, "give_up_after_ms": 1}, D.START_POSTCOPY),
        ({"remaining_bytes": 1, "give_up_after_ms": 1, "remaining_is_exact": True}, D.SWITCH_OVER),
    ],
)
def test_decisions(changed: dict[str, object], decision: Decision) -> None:
    verdict = decide(figures(**changed))
    assert verdict.decision is decision
    assert verdict.reason


def test_giving_up_says_why() -> None:
    slow = decide(figures(give_up_after_ms=1, dirty_rate_bytes_per_s=200.0 * MIB))
    assert "faster than they can be sent" in slow.reason
    assert "more remains" in decide(figures(give_up_after_ms=1)).reason


def test_expected_downtime() -> None:
    assert decide(figures()).threshold_bytes == 30 * MIB
    assert decide(figures()).expected_downtime_ms == 640
    assert expected_downtime_ms(figures(remaining_bytes=1)) == 1
    assert expected_downtime_ms(figures(remaining_bytes=0)) == 0
    assert expected_downtime_ms(figures(bandwidth_bytes_per_s=0.0)) == 300


@given(
    st.builds(
        Figures,
        st.integers(0, 1 << 40),
        st.booleans(),
        st.floats(0, 1e11),
        st.floats(0, 1e11),
        st.integers(0, 2000000),
        st.integers(0, 1 << 32),
        st.booleans(),
        st.booleans(),
        st.integers(0, 1 << 32),
        st.integers(0, 1 << 32),
    )
)
def test_every_verdict_keeps_the_promises(some: Figures) -> None:
    verdict = decide(some)
    match verdict.decision:
        case D.SWITCH_OVER:
            assert some.remaining_is_exact
            assert some.remaining_bytes == 0 or verdict.expected_downtime_ms <= some.downtime_limit_ms
        case D.SYNC:
            assert not some.remaining_is_exact
        case D.START_POSTCOPY:
            assert some.postcopy_enabled
            assert some.postcopy_requested or some.postcopy_start_time_ms
        case D.GIVE_UP:
            assert some.give_up_after_ms
        case D.ITERATE:
            assert some.remaining_bytes


@pytest.mark.parametrize(
    ("changed", "verdict", "why"),
    [
        ({"bandwidth_bytes_per_s": 0.0}, "unknown", "nothing is measured yet"),
        ({}, "converging", "the guest dirties 10.0 MiB/s, 100.0 MiB/s are sent"),
        ({"throttle_percentage": 30}, "converging", "it is throttled by 30 %"),
        ({"dirty_rate_bytes_per_s": 90.0 * MIB}, "not-converging", "will not converge at this rate, because"),
        (
            {"dirty_rate_bytes_per_s": 90.0 * MIB, "remaining_bytes": MIB},
            "converging",
            "what remains fits into the downtime limit",
        ),
        ({"downtime_limit_ms": 0}, "not-converging", "will not converge with this downtime limit"),
        ({"downtime_limit_ms": 0, "dirty_rate_bytes_per_s": 0.0}, "converging", "dirties 0.0 MiB/s"),
    ],
)
def test_the_outlook_says_whether_it_converges_and_why(
    changed: dict[str, object], verdict: str, why: str
) -> None:
    seen = outlook(figures(**changed))
    assert seen.verdict == verdict
    assert why in seen.reason
    assert seen.query()["bandwidth"] == round(figures(**changed).bandwidth_bytes_per_s)
    assert seen.expected_downtime_ms == decide(figures(**changed)).expected_downtime_ms
