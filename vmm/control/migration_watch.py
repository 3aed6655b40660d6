"""~ What people want to see of a migration: replies of query-migrate in, now and then, a view out.

QEMU's reply forgets (a failed migration shows no figures) and its remaining bytes go up with every sync. A
view remembers: the last figures of the last migration, the phases it went through, progress that never runs
backwards, the course of the rates. It also says in a sentence whether the migration will end.

Progress is the part of RAM that is up to date at the destination, the best so far, and 1 only when completed.
Between two looks anything may have happened: a phase that was over in between shows as done, not as skipped,
if every migration goes through it.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["ENDED", "MigrationWatch"]

ENDED: Final = frozenset({"completed", "failed", "cancelled"})

_PHASES: Final = {
    "setup": "Set-up",
    "active": "Precopy",
    "device": "Switchover",
    "postcopy-active": "Postcopy",
    "completed": "Completed",
}
_PHASE_OF: Final = {
    "pre-switchover": "device",
    "postcopy-paused": "postcopy-active",
    "postcopy-recover": "postcopy-active",
}
"""Statuses that are part of another one's phase."""

_ALMOST: Final = 0.99
_HOPELESS: Final = 0.9
"""Of the bandwidth. A guest that writes to all its working set in each pass is measured at about the
bandwidth, however much faster it is."""
_MAX_POINTS: Final = 240
"""Of the course; when there are more, every second one goes."""
_PAGE_BYTES: Final = 4096


class MigrationWatch:
    """The migration that runs, or ran last."""

    def __init__(self) -> None:
        self.status = "none"
        self.role = "source"
        self.figures: dict[str, Any] = {}
        """The last reply that had any figures; it stays when the migration has ended."""
        self.progress = 0.0
        self.bandwidth_bytes_per_s = 0.0
        self.dirty_rate_bytes_per_s = 0.0
        self._error: str | None = None
        self._forget(0.0)

    def _forget(self, now_s: float) -> None:
        self._visited: list[str] = []
        self._began_s = now_s
        self._last = (now_s, 0)  # when, and the bytes received then
        self._course: list[list[float]] = []
        self._stretch = 1
        self._looks = 0
        self._pass = 0
        self._pass_bytes = 0
        self._pass_progress = 0.0
        self.figures = {}
        self.progress = 0.0
        self.bandwidth_bytes_per_s = 0.0
        self.dirty_rate_bytes_per_s = 0.0

    @property
    def is_in_progress(self) -> bool:
        """Whether a migration runs now."""
        return self.status not in ENDED and self.status != "none"

    def look(self, reply: dict[str, Any], is_incoming: bool, now_s: float) -> None:
        """Take a reply of query-migrate. `is_incoming`: the machine waits for one. `now_s` is monotonic."""
        status = str(reply.get("status", "none"))
        if status == "none":
            return  # nothing yet, or a destination that listens
        role = _role(reply, is_incoming)
        was_running = self.is_in_progress
        elapsed_ms = reply.get("total-time", self.figures.get("total-time", 0))
        is_new = role != self.role or (not was_running and status != self.status)
        if is_new or self.status == "none" or elapsed_ms < self.figures.get("total-time", 0):
            self._forget(now_s)
        self.status, self.role = status, role
        self._error = reply.get("error-desc")
        phase = _PHASE_OF.get(status, status)
        if phase not in self._visited:
            self._visited.append(phase)
        if "ram" in reply or "x-received" in reply:
            self.figures = reply
            self._measure(reply, now_s)
        if status == "completed":
            self.progress = 1.0

    def _measure(self, reply: dict[str, Any], now_s: float) -> None:
        cells = reply.get("x-page-map") or [0.0]
        self.progress = max(self.progress, min(sum(cells) / len(cells), _ALMOST))
        if "ram" in reply:
            ram = reply["ram"]
            self.bandwidth_bytes_per_s = ram["mbps"] * 1e6 / 8
            # In postcopy the guest writes elsewhere; the reply goes on showing the rate of the last sync.
            dirty_pages_per_s = 0 if "postcopy-active" in self._visited else ram["dirty-pages-rate"]
            self.dirty_rate_bytes_per_s = float(dirty_pages_per_s * ram["page-size"])
            self._measure_pass(ram)
        else:
            self._measure_received(reply["x-received"], now_s)
        if not self.is_in_progress:
            return
        self._looks += 1
        if self._looks % self._stretch == 0:
            point = (now_s - self._began_s, self.bandwidth_bytes_per_s, self.dirty_rate_bytes_per_s)
            self._course.append([round(figure, 3) for figure in point])
        if len(self._course) > _MAX_POINTS:
            del self._course[1::2]
            self._stretch *= 2

    def _measure_pass(self, ram: dict[str, Any]) -> None:
        """The part of this pass over RAM that is done; a pass begins with a sync, or with postcopy."""
        number = ram["dirty-sync-count"] + ("postcopy-active" in self._visited)
        if number != self._pass or ram["remaining"] > self._pass_bytes:
            self._pass, self._pass_bytes, self._pass_progress = number, ram["remaining"], 0.0
        if self._pass_bytes:
            self._pass_progress = max(self._pass_progress, 1 - ram["remaining"] / self._pass_bytes)

    def _measure_received(self, received: dict[str, int], now_s: float) -> None:
        count = received["normal-pages"] * _PAGE_BYTES
        then_s, count_then = self._last
        if now_s - then_s > 0.1:
            self._last = (now_s, count)
            self.bandwidth_bytes_per_s = max(count - count_then, 0) / (now_s - then_s)

    def view(self) -> dict[str, Any] | None:
        """As JSON for the page; None if there was no migration."""
        if self.status == "none":
            return None
        ram = self.figures.get("ram", {})
        return {
            "role": self.role,
            "status": self.status,
            "inProgress": self.is_in_progress,
            "error": self._error,
            "phases": self._phases(),
            "progress": round(self.progress, 4),
            "pass": self._pass,
            "passProgress": round(self._pass_progress, 4),
            "outlook": self._outlook(ram),
            "pageMap": self.figures.get("x-page-map", []),
            "bandwidth": self.bandwidth_bytes_per_s,
            "dirtyRate": self.dirty_rate_bytes_per_s,
            "course": self._course,
            "figures": {key: value for key, value in self.figures.items() if key != "x-page-map"},
        }

    def _phases(self) -> list[dict[str, str]]:
        now = _PHASE_OF.get(self.status, self.status)
        names = list(_PHASES) if self.role == "source" else [name for name in _PHASES if name != "device"]
        labels = dict(_PHASES)
        if now in ENDED - {"completed"} or now == "cancelling":
            names[-1] = now
            labels[now] = now.capitalize()
        reached = max(names.index(name) for name in [*self._visited, names[0]] if name in names)
        phases = []
        for index, name in enumerate(names):
            if name == now:
                state = "done" if name == "completed" else "ended" if name in ENDED else "now"
            elif index > reached:
                state = "next"
            else:
                skipped = name == "postcopy-active" or now in ENDED - {"completed"} or now == "cancelling"
                state = "skipped" if skipped and name not in self._visited else "done"
            phases.append({"name": name, "label": labels[name], "state": state})
        return phases

    def _outlook(self, ram: dict[str, Any]) -> str:
        """Whether and when it ends, in a sentence."""
        match self.status:
            case "completed":
                return "The guest has moved." if self.role == "source" else "The guest is here."
            case "failed" | "cancelled":
                return "The guest stays at the source." if self.role == "source" else "The guest is not here."
            case "postcopy-paused":
                return "The connection was lost. The guest waits until the migration is recovered."
            case "pre-switchover":
                return "Paused before switchover: migrate-continue goes on."
            case "active" | "postcopy-active" if ram:
                return self._forecast(ram)
        return ""

    def _forecast(self, ram: dict[str, Any]) -> str:
        bandwidth, dirty_rate = self.bandwidth_bytes_per_s, self.dirty_rate_bytes_per_s
        if bandwidth <= 0:
            return "Nothing is measured yet."
        if self.status == "postcopy-active":
            return (
                f"Ends in about {_seconds(ram['remaining'] / bandwidth)}: in postcopy no page is sent twice."
            )
        if dirty_rate >= _HOPELESS * bandwidth:
            return (
                "Will not converge at this rate: the guest writes as fast as pages are sent. "
                "Start postcopy, allow more bandwidth, or allow a longer downtime."
            )
        if ram["dirty-sync-count"] < 2:
            return f"The first pass ends in about {_seconds(ram['remaining'] / bandwidth)}."
        return f"Switchover in about {_seconds(ram['remaining'] / (bandwidth - dirty_rate))} at this rate."


def _role(reply: dict[str, Any], is_incoming: bool) -> str:
    if "ram" in reply:
        return "source"
    return "destination" if "x-received" in reply or is_incoming else "source"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
