"""The summary of the comparison with stock QEMU; the measuring itself is `make bench`."""

from __future__ import annotations

from tools.compare import summarise


def sample(total: float) -> dict[str, float]:
    return {"total-time": total, "downtime": 2.0, "mbps": 1000.0}


def test_medians_and_ratio() -> None:
    samples = {
        mode: {"pageferry": [sample(300), sample(100), sample(200)], "stock": [sample(100)] * 3}
        for mode in ("precopy", "postcopy")
    }
    lines = summarise(samples)
    assert lines[0].split() == ["median", "pageferry", "stock", "ratio"]
    assert lines[2].split() == ["precopy:", "total", "time,", "ms", "200", "100", "2.00"]
    assert len(lines) == 2 + 6


def test_one_machine_alone_has_no_ratio() -> None:
    samples = {mode: {"stock": [sample(100)]} for mode in ("precopy", "postcopy")}
    assert summarise(samples)[0].split() == ["median", "stock"]
