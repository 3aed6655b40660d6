"""The exposition format, read back by its own rules; every family of a real reply."""

from __future__ import annotations

import re

import pytest

from vmm.control.metrics import MetricsText, migration_metrics

SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)"
    r'(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? '
    r"(NaN|[+-]Inf|-?[0-9.]+(?:e[+-]?[0-9]+)?)"
)


def read(text: str) -> dict[str, dict[str, float]]:
    """Family -> sample with labels -> value; fails on anything that the format does not allow."""
    families: dict[str, dict[str, float]] = {}
    kind = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert len(line.split(" ", 3)[3]) > 4
        elif line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert kind in ("counter", "gauge", "histogram")
            assert family not in families, "a family comes once, in one piece"
            assert kind != "counter" or family.endswith("_total")
            families[family] = {}
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = list(families)[-1]
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert match[1] in [family + suffix for suffix in suffixes]
            sample = line.rpartition(" ")[0]
            assert sample not in families[family], "a sample comes once"
            families[family][sample] = float(match[3])
    return families


def test_samples() -> None:
    text = MetricsText()
    text.add("a_total", "counter", "What it is.", 3)
    text.add("b", "gauge", "What it is.", 0.5, name='x"y\\z\n')
    text.add_states("c", "What it is.", ["on", "off"], "off")
    families = read(str(text))
    assert families["pageferry_a_total"] == {"pageferry_a_total": 3}
    assert families["pageferry_b"] == {r'pageferry_b{name="x\"y\\z\n"}': 0.5}
    assert families["pageferry_c"] == {'pageferry_c{state="on"}': 0, 'pageferry_c{state="off"}': 1}


def test_histogram() -> None:
    text = MetricsText()
    text.add_histogram("h", "What it is.", [0.001, 2.0], [1, 0, 4], 12.5)
    assert read(str(text))["pageferry_h"] == {
        'pageferry_h_bucket{le="0.001"}': 1,
        'pageferry_h_bucket{le="2"}': 1,
        'pageferry_h_bucket{le="+Inf"}': 5,
        "pageferry_h_sum": 12.5,
        "pageferry_h_count": 5,
    }
    with pytest.raises(ValueError, match="zip"):
        text.add_histogram("h", "What it is.", [1.0], [1], 0.0)


def test_migration() -> None:
    text = MetricsText()
    names = "remaining total normal duplicate dirty-sync-count dirty-pages-rate"
    ram = dict.fromkeys([*names.split(), "pages-per-second", "postcopy-requests"], 7) | {"mbps": 8.0}
    ram |= {"precopy-bytes": 1, "downtime-bytes": 2, "postcopy-bytes": 3}
    latency = {
        "count": 3,
        "sum": 6000,
        "median": 1000,
        "p99": 2000,
        "maximum": 3000,
        "distribution": [1, 2, *[0] * 22],
    }
    figures = {
        "setup-time": 1,
        "total-time": 2500,
        "downtime": 30,
        "ram": ram,
        "x-fault-latency": latency,
        "x-postcopy": {"requested-pages": 5},
        "x-received": {"normal-pages": 6},
    }
    migration_metrics(text, figures)
    families = read(str(text))
    assert families["pageferry_migration_total_seconds"] == {"pageferry_migration_total_seconds": 2.5}
    assert families["pageferry_migration_transferred_bytes"] == {
        'pageferry_migration_transferred_bytes{phase="precopy"}': 1,
        'pageferry_migration_transferred_bytes{phase="downtime"}': 2,
        'pageferry_migration_transferred_bytes{phase="postcopy"}': 3,
    }
    assert families["pageferry_migration_bandwidth_bytes_per_second"] == {
        "pageferry_migration_bandwidth_bytes_per_second": 1e6
    }
    buckets = families["pageferry_migration_fault_latency_seconds"]
    assert buckets['pageferry_migration_fault_latency_seconds_bucket{le="2e-06"}'] == 1
    assert buckets['pageferry_migration_fault_latency_seconds_bucket{le="4e-06"}'] == 3
    assert buckets["pageferry_migration_fault_latency_seconds_sum"] == pytest.approx(6e-6)
    assert len(buckets) == 26
    nothing = MetricsText()
    migration_metrics(nothing, {})
    assert str(nothing) == ""
