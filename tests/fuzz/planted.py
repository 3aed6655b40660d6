"""An invariant that does not hold, to test the fuzzing itself: no text has three brackets in a row."""

SEEDS = [b"[1]", b"[[1]]"]
TOKENS = [b"["]


def check(data: bytes) -> None:
    """One input."""
    assert b"[[[" not in data, "too deep"
