"""~ Figures as text for Prometheus: families of samples in, the exposition format out.

    # HELP pageferry_ram_bytes Guest RAM.
    # TYPE pageferry_ram_bytes gauge
    pageferry_ram_bytes 1.34217728e+08

Source: Prometheus, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

__all__ = ["CONTENT_TYPE", "MetricsText", "migration_metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "pageferry_"
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class MetricsText:
    """Collects families; `str()` is the text."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    def add(self, name: str, kind: str, help_: str, value: float, /, **labels: str) -> None:
        """A family of one sample. `kind`: counter or gauge."""
        self.add_family(name, kind, help_, [(labels, value)])

    def add_family(
        self, name: str, kind: str, help_: str, samples: Iterable[tuple[Mapping[str, str], float]]
    ) -> None:
        """A family of samples that differ in their labels."""
        self._head(name, kind, help_)
        for labels, value in samples:
            self._sample(name, labels, value)

    def add_states(self, name: str, help_: str, states: Iterable[str], now: str) -> None:
        """One sample for each state there is: 1 for the present one, 0 for the others."""
        self.add_family(name, "gauge", help_, [({"state": state}, state == now) for state in states])

    def add_histogram(
        self, name: str, help_: str, bounds: Sequence[float], counts: Sequence[int], sum_: float
    ) -> None:
        """`counts[i]` samples up to `bounds[i]`, the last ones above all bounds; `sum_` is of all samples."""
        self._head(name, "histogram", help_)
        total = 0
        for bound, count in zip([*bounds, float("inf")], counts, strict=True):
            total += count
            self._sample(f"{name}_bucket", {"le": f"{bound:g}".replace("inf", "+Inf")}, total)
        self._sample(f"{name}_sum", {}, sum_)
        self._sample(f"{name}_count", {}, total)

    def _head(self, name: str, kind: str, help_: str) -> None:
        self._lines += [f"# HELP {_PREFIX}{name} {help_}", f"# TYPE {_PREFIX}{name} {kind}"]

    def _sample(self, name: str, labels: Mapping[str, str], value: float) -> None:
        listed = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
        shown = f"{{{listed}}}" if listed else ""
        self._lines.append(f"{_PREFIX}{name}{shown} {float(value)!r}")


_TIMES: Final = {
    "setup-time": ("setup_seconds", "From the command to the first page."),
    "total-time": ("total_seconds", "Since the start."),
    "downtime": ("downtime_seconds", "How long the guest stood still; when completed."),
    "expected-downtime": ("expected_downtime_seconds", "If it switched over now."),
}
_RAM: Final = {
    "remaining": ("remaining_bytes", "Still to be sent."),
    "total": ("total_bytes", "All RAM."),
    "normal": ("normal_pages", "Pages sent whole."),
    "duplicate": ("zero_pages", "Pages sent as zero."),
    "dirty-sync-count": ("dirty_syncs", "Syncs of the dirty bitmap."),
    "dirty-pages-rate": ("dirty_pages_per_second", "Pages the guest wrote to."),
    "pages-per-second": ("pages_per_second", "Pages sent."),
    "postcopy-requests": ("postcopy_requests", "Pages the destination asked for."),
}
_RECEIVED_HELP: Final = "What the destination has counted."


def migration_metrics(text: MetricsText, figures: Mapping[str, Any]) -> None:
    """The figures of a reply of query-migrate, as far as it has any."""
    for key, (name, help_) in _TIMES.items():
        if key in figures:
            text.add(f"migration_{name}", "gauge", help_, figures[key] / 1000)
    if "ram" in figures:
        ram = figures["ram"]
        phases = [({"phase": phase}, ram[f"{phase}-bytes"]) for phase in ("precopy", "downtime", "postcopy")]
        text.add_family("migration_transferred_bytes", "gauge", "Bytes on the wire by phase.", phases)
        for key, (name, help_) in _RAM.items():
            text.add(f"migration_{name}", "gauge", help_, ram[key])
        text.add("migration_bandwidth_bytes_per_second", "gauge", "Sent.", ram["mbps"] * 1e6 / 8)
        throttle = figures.get("cpu-throttle-percentage", 0) / 100
        text.add("migration_cpu_throttle_ratio", "gauge", "Of the time the vCPU is kept still.", throttle)
    if "x-postcopy" in figures:
        pages = [({"kind": key.removesuffix("-pages")}, n) for key, n in figures["x-postcopy"].items()]
        text.add_family("migration_source_pages", "gauge", "What postcopy did with pages.", pages)
    if "x-received" in figures:
        counts = [({"kind": key}, count) for key, count in figures["x-received"].items()]
        text.add_family("migration_received", "gauge", _RECEIVED_HELP, counts)
    if "postcopy-blocktime" in figures:
        blocked_s = figures["postcopy-blocktime"] / 1000
        text.add("migration_postcopy_blocktime_seconds", "gauge", "The guest waited for pages.", blocked_s)
    if "x-fault-latency" in figures:
        _latency(text, figures["x-fault-latency"])


def _latency(text: MetricsText, latency: Mapping[str, Any]) -> None:
    counts = latency["distribution"]
    bounds = [2e-6 * 2**number for number in range(len(counts) - 1)]
    help_ = "How long the guest waited for a page it had to ask for."
    text.add_histogram("migration_fault_latency_seconds", help_, bounds, counts, latency["sum"] / 1e9)
    samples = [({"quantile": name}, latency[name] / 1e9) for name in ("median", "p99", "maximum")]
    text.add_family("migration_fault_latency_quantile_seconds", "gauge", help_, samples)
