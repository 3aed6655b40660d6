"""Capabilities and parameters of a migration: names, values, ranges, units, defaults, and what excludes what.

Both classes set all or nothing: a list with one bad member changes nothing. Names, orders, defaults and
error texts are QEMU 7.2's. What differs, on purpose:

- a capability that this version does not have is refused with the reason, instead of being stored and
  ignored; so are TLS credentials, which would otherwise promise a secrecy that there is not;
- `x-postcopy-ram`, the founding document's name, is an alias of `postcopy-ram`;
- `x-postcopy-start-time` (ms, 0 = off) starts postcopy when precopy has not finished by then;
- `x-handshake-timeout` (ms, 0 = off): a peer that has not said who it is by then is turned away;
- `x-peer-timeout` (ms, 0 = off): a peer that gives no sign of life for so long counts as lost;
- values that 7.2 lets slip through are refused: a bandwidth of -1, compression levels that do not exist.

Whether a migration is running, when capabilities may not change, is for the caller to know.

Source: QEMU 7.2 qapi/migration.json, migration/migration.c (migrate_caps_check, migrate_params_check).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from vmm.migration.errors import ParameterRefused

__all__ = [
    "PARAMETERS",
    "UNSUPPORTED",
    "Capabilities",
    "Capability",
    "Parameter",
    "Parameters",
    "Patience",
]


HOUR_MS: Final = 3_600_000

SHORTEST_PEER_TIMEOUT_MS: Final = 1000
"""Signs of life come four times a second."""


@dataclass(frozen=True)
class Patience:
    """How long a peer may be silent, in ms; 0: for ever."""

    handshake_ms: int = 10_000
    """From the connection to the end of header and configuration."""
    peer_ms: int = 30_000
    """From then on."""


class Capability(Enum):
    """QEMU's 21 capabilities in the order in which it lists them, and ours."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    ZERO_BLOCKS = "zero-blocks"
    COMPRESS = "compress"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    BLOCK = "block"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"
    X_POSTCOPY_SPOOL = "x-postcopy-spool"
    X_PAGE_CHECKSUMS = "x-page-checksums"


_C = Capability

ALIASES: Final = {"x-postcopy-ram": _C.POSTCOPY_RAM}

UNSUPPORTED: Final[dict[Capability, str]] = {
    _C.RDMA_PIN_ALL: "there is no RDMA transport",
    _C.COMPRESS: "page compression is not implemented",
    _C.X_COLO: "COLO is not implemented",
    _C.BLOCK: "disks do not migrate; share the file between both sides",
    _C.DIRTY_BITMAPS: "block devices have no dirty bitmaps",
    _C.X_IGNORE_SHARED: "shared RAM is migrated like any other",
    _C.BACKGROUND_SNAPSHOT: "background snapshots are not implemented",
    _C.ZERO_COPY_SEND: "zero copy is not implemented",
}
"""Refused with this reason. Of the others zero-blocks and late-block-activate have nothing to act on."""

# In QEMU's order: the first in the list that is on is the one named.
_NOT_WITH_BACKGROUND_SNAPSHOT: Final = (
    _C.POSTCOPY_RAM,
    _C.DIRTY_BITMAPS,
    _C.POSTCOPY_BLOCKTIME,
    _C.LATE_BLOCK_ACTIVATE,
    _C.RETURN_PATH,
    _C.MULTIFD,
    _C.PAUSE_BEFORE_SWITCHOVER,
    _C.AUTO_CONVERGE,
    _C.RELEASE_RAM,
    _C.RDMA_PIN_ALL,
    _C.COMPRESS,
    _C.XBZRLE,
    _C.X_COLO,
    _C.VALIDATE_UUID,
    _C.ZERO_COPY_SEND,
)


def _conflict(on: frozenset[Capability]) -> str | None:
    """QEMU's text if capabilities exclude each other or one needs another; None if the set is possible."""
    if {_C.POSTCOPY_RAM, _C.X_IGNORE_SHARED} <= on:
        return "Postcopy is not compatible with ignore-shared"
    if _C.BACKGROUND_SNAPSHOT in on:
        for capability in _NOT_WITH_BACKGROUND_SNAPSHOT:
            if capability in on:
                return f"Background-snapshot is not compatible with {capability.value}"
    if _C.ZERO_COPY_SEND in on and (_C.MULTIFD not in on or on & {_C.COMPRESS, _C.XBZRLE}):
        return "Zero copy only available for non-compressed non-TLS multifd migration"
    if _C.POSTCOPY_PREEMPT in on:
        if _C.POSTCOPY_RAM not in on:
            return "Postcopy preempt requires postcopy-ram"
        if _C.COMPRESS in on:
            return "Postcopy preempt not compatible with compress"
    if {_C.X_POSTCOPY_SPOOL, _C.RELEASE_RAM} <= on:
        return "A spool is of the RAM that release-ram gives back"
    if {_C.POSTCOPY_RAM, _C.MULTIFD} <= on:  # 7.2 lets it pass, 8.0 and later refuse it in these words
        return "Postcopy is not yet compatible with multifd"
    if {_C.MULTIFD, _C.X_PAGE_CHECKSUMS} <= on:
        return "The packets of multifd have no place for page checksums"
    if {_C.MULTIFD, _C.COMPRESS} <= on:
        return "Multifd is not compatible with compress"
    return None


class Capabilities:
    """Which capabilities are on; any thread.

    `why_no_postcopy` is asked when postcopy-ram is switched on: it gives the reason and the cure if this side
    cannot do it (a destination without userfaultfd), else None.
    """

    def __init__(self, why_no_postcopy: Callable[[], str | None] = lambda: None) -> None:
        self._why_no_postcopy = why_no_postcopy
        self._lock = threading.Lock()  # protects the exchange of _on; the set itself never changes
        self._on: frozenset[Capability] = frozenset()

    def __getitem__(self, capability: Capability) -> bool:
        return capability in self._on

    @property
    def enabled(self) -> frozenset[Capability]:
        """Those that are on, as they are now."""
        return self._on

    def set(self, changes: Iterable[Mapping[str, Any]]) -> None:
        """Take `[{"capability": name, "state": bool}]`, as migrate-set-capabilities has it.

        Raises ParameterRefused, and changes nothing, for an unknown name, a combination that cannot be, or a
        capability that this version or this host does not have.
        """
        wanted = [(self._by_name(change["capability"]), bool(change["state"])) for change in changes]
        with self._lock:
            on = set(self._on)
            for capability, state in wanted:
                (on.add if state else on.discard)(capability)
            self._check(frozenset(on))
            self._on = frozenset(on)

    def set_one(self, name: str, state: bool) -> None:
        """The monitor's `migrate_set_capability NAME on|off`; raises as `set`."""
        self.set([{"capability": name, "state": state}])

    @staticmethod
    def _by_name(name: str) -> Capability:
        if name in ALIASES:
            return ALIASES[name]
        try:
            return Capability(name)
        except ValueError:
            text = f"Parameter 'capability' does not accept value '{name}'"
            raise ParameterRefused("capability", text) from None

    def _check(self, on: frozenset[Capability]) -> None:
        if _C.POSTCOPY_RAM in on - self._on:
            reason = self._why_no_postcopy()
            if reason is not None:
                raise ParameterRefused(_C.POSTCOPY_RAM.value, f"Postcopy is not supported: {reason}")
        conflict = _conflict(on)
        if conflict is not None:
            raise ParameterRefused("capability", conflict)
        for capability, reason in UNSUPPORTED.items():
            if capability in on:
                text = f"Capability '{capability.value}' is not supported: {reason}"
                raise ParameterRefused(capability.value, text)

    def query(self) -> list[dict[str, Any]]:
        """The reply of query-migrate-capabilities."""
        on = self._on
        return [{"capability": each.value, "state": each in on} for each in Capability]


@dataclass(frozen=True)
class Parameter:
    """One parameter: its type and range, and the text that says what is accepted.

    `kind` is "int", "size" (an int for which the monitor takes suffixes), "bool", "str" or "enum". `bits` is
    the width of an int; values beyond it are called a wrong type, as QEMU does.
    """

    name: str
    kind: str
    default: int | bool | str
    bits: int = 64
    low: int = 0
    high: int | None = None
    expects: str = ""
    unit: str = ""
    values: tuple[str, ...] = ()
    suffix: str = "B"
    """What a bare number means in the monitor: bytes, or "M"."""

    def check(self, value: Any) -> int | bool | str:
        """The value as it is stored; raises ParameterRefused with QEMU's text."""
        if self.kind == "bool":
            return bool(self._typed(value, bool, "boolean"))
        if self.kind == "str":
            # The TLS parameters are StrOrNull in QEMU; null means none.
            return str(self._typed("" if value is None else value, str, "StrOrNull"))
        if self.kind == "enum":
            if value not in self.values:
                raise self._refused(f"Parameter '{self.name}' does not accept value '{value}'")
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refused(f"Parameter '{self.name}' expects {self._type_name}")
        if value >> self.bits > 0:
            raise self._refused(f"Parameter '{self.name}' expects {self._type_name}")
        if value < self.low or (self.high is not None and value > self.high):
            raise self.out_of_range()
        return value

    @property
    def _type_name(self) -> str:
        return "uint64" if self.bits == 64 else f"uint{self.bits}_t"

    def _typed(self, value: Any, wanted: type, type_name: str) -> Any:
        if isinstance(value, wanted):
            return value
        raise self._refused(f"Invalid parameter type for '{self.name}', expected: {type_name}")

    def _refused(self, text: str) -> ParameterRefused:
        return ParameterRefused(self.name, text)

    def out_of_range(self) -> ParameterRefused:
        """The error for a value outside the range; QEMU writes the name with underscores here."""
        expects = (
            self.expects or f"an integer in the range of {self.low} to {(1 << self.bits) - 1} {self.unit}"
        )
        return self._refused(f"Parameter '{self.name.replace('-', '_')}' expects {expects.rstrip()}")

    def from_text(self, text: str) -> int | bool | str:
        """A value as a person types it in the monitor; raises ParameterRefused."""
        if self.kind in ("str", "enum"):
            return self.check(text)
        if self.kind == "bool":
            if text not in ("on", "off"):
                raise self._refused(f"Parameter '{self.name}' expects 'on' or 'off'")
            return text == "on"
        return self.check(self._number(text))

    def _number(self, text: str) -> int:
        digits, scale = text, 1
        if self.kind == "size":
            suffix = text[-1:].upper()
            if suffix not in _SIZE_SUFFIXES:
                suffix = self.suffix
            else:
                digits = text[:-1]
            scale = 1 << 10 * _SIZE_SUFFIXES.index(suffix)
        try:
            return int(digits, 0) * scale
        except ValueError:
            what = f"Invalid size {text}" if self.kind == "size" else ""
            raise self._refused(what or f"Parameter '{self.name}' expects {self._type_name}") from None

    def show(self, value: object) -> str:
        """The value with its unit, as the monitor prints it."""
        if self.kind == "bool":
            return "on" if value else "off"
        if self.kind == "str":
            return f"'{value}'"
        return f"{value} {self.unit}".rstrip()


_SIZE_SUFFIXES: Final = "BKMGTPE"


def _between(name: str, default: int, low: int, high: int, *, bits: int = 64, unit: str = "") -> Parameter:
    return Parameter(name, "int", default, bits, low, high, f"a value between {low} and {high}", unit)


def _in_range(name: str, default: int, low: int, high: int) -> Parameter:
    return Parameter(name, "int", default, 8, low, high, f"an integer in the range of {low} to {high}")


PARAMETERS: Final[dict[str, Parameter]] = {
    parameter.name: parameter
    for parameter in (
        _between("announce-initial", 50, 0, 100000, unit="ms"),
        _between("announce-max", 550, 0, 100000, unit="ms"),
        _between("announce-rounds", 5, 0, 1000),
        # QEMU says 0 and wants 1.
        Parameter("announce-step", "int", 100, 64, 1, 10000, "a value between 0 and 10000", "ms"),
        _between("compress-level", 1, 0, 9, bits=8),
        _between("compress-threads", 8, 1, 255, bits=8),
        Parameter("compress-wait-thread", "bool", True),
        _between("decompress-threads", 2, 1, 255, bits=8),
        _in_range("throttle-trigger-threshold", 50, 1, 100),
        _in_range("cpu-throttle-initial", 20, 1, 99),
        _in_range("cpu-throttle-increment", 10, 1, 99),
        Parameter("cpu-throttle-tailslow", "bool", False),
        Parameter(
            "max-cpu-throttle",
            "int",
            99,
            8,
            0,
            99,
            "an integer in the range of cpu_throttle_initial to 99",
        ),
        Parameter("tls-creds", "str", ""),
        Parameter("tls-hostname", "str", ""),
        Parameter("max-bandwidth", "size", 128 << 20, unit="bytes/second", suffix="M"),
        Parameter(
            "downtime-limit",
            "int",
            300,
            high=2000 * 1000,
            expects="an integer in the range of 0 to (2000 * 1000) ms",
            unit="ms",
        ),
        Parameter("x-checkpoint-delay", "int", 20000, bits=32, unit="ms"),
        Parameter("block-incremental", "bool", False),
        _between("multifd-channels", 2, 1, 255, bits=8),
        Parameter("multifd-compression", "enum", "none", values=("none", "zlib", "zstd")),
        _between("multifd-zlib-level", 1, 0, 9, bits=8),
        _between("multifd-zstd-level", 1, 0, 20, bits=8),
        Parameter(
            "xbzrle-cache-size",
            "size",
            64 << 20,
            expects="a power of two no less than the target page size",
            unit="bytes",
        ),
        Parameter("max-postcopy-bandwidth", "size", 0),
        Parameter("tls-authz", "str", ""),
        Parameter("x-postcopy-start-time", "int", 0, bits=32, unit="ms"),
        Parameter("x-postcopy-spool-path", "str", ""),
        _between("x-handshake-timeout", 10_000, 0, HOUR_MS, bits=32, unit="ms"),
        Parameter(
            "x-peer-timeout",
            "int",
            30_000,
            32,
            0,
            HOUR_MS,
            f"0, or a value between {SHORTEST_PEER_TIMEOUT_MS} and {HOUR_MS}",
            "ms",
        ),
    )
}
"""In the order in which the monitor prints them."""

_TARGET_PAGE_SIZE_BYTES: Final = 4096


class Parameters:
    """The parameters' values; any thread, and they may be set while a migration runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects the exchange of _values; the dict itself never changes
        self._values: Mapping[str, Any] = {name: each.default for name, each in PARAMETERS.items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @property
    def max_bandwidth_bytes_per_s(self) -> int:
        """Precopy's limit, 0 = none."""
        return int(self._values["max-bandwidth"])

    @property
    def max_postcopy_bandwidth_bytes_per_s(self) -> int:
        """The limit of postcopy's linear scan, 0 = none."""
        return int(self._values["max-postcopy-bandwidth"])

    @property
    def downtime_limit_ms(self) -> int:
        """How long the guest may stand still at the switchover."""
        return int(self._values["downtime-limit"])

    @property
    def postcopy_start_time_ms(self) -> int:
        """Postcopy starts by itself when precopy has taken this long, 0 = never."""
        return int(self._values["x-postcopy-start-time"])

    @property
    def postcopy_spool_path(self) -> str:
        """Where what a killed source owed is saved."""
        return str(self._values["x-postcopy-spool-path"])

    def patience(self) -> Patience:
        """How long a peer may be silent."""
        return Patience(int(self._values["x-handshake-timeout"]), int(self._values["x-peer-timeout"]))

    def set(self, changes: Mapping[str, Any]) -> None:
        """Take `{name: value}`, as migrate-set-parameters has it; raises ParameterRefused, all or nothing."""
        checked = {}
        for name, value in changes.items():
            if name == "block-bitmap-mapping":
                raise ParameterRefused(name, f"Parameter '{name}' is not supported: {_NO_BITMAPS}")
            if name not in PARAMETERS:
                raise ParameterRefused(name, f"Parameter '{name}' is unexpected")
            checked[name] = PARAMETERS[name].check(value)
        with self._lock:
            values = {**self._values, **checked}
            _check_values(values)
            self._values = values

    def set_one(self, name: str, text: str) -> None:
        """The monitor's `migrate_set_parameter NAME VALUE`; raises as `set`."""
        if name not in PARAMETERS:
            raise ParameterRefused(name, f"invalid parameter value: {name}")
        self.set({name: PARAMETERS[name].from_text(text)})

    def query(self) -> dict[str, Any]:
        """The reply of query-migrate-parameters."""
        return dict(self._values)


_NO_BITMAPS: Final = UNSUPPORTED[Capability.DIRTY_BITMAPS]


def _check_values(values: Mapping[str, Any]) -> None:
    """What depends on more than the range of one number; raises ParameterRefused."""
    size = values["xbzrle-cache-size"]
    if size < _TARGET_PAGE_SIZE_BYTES or size & (size - 1):
        raise PARAMETERS["xbzrle-cache-size"].out_of_range()
    if 0 < values["x-peer-timeout"] < SHORTEST_PEER_TIMEOUT_MS:
        raise PARAMETERS["x-peer-timeout"].out_of_range()
    if values["max-cpu-throttle"] < values["cpu-throttle-initial"]:
        raise PARAMETERS["max-cpu-throttle"].out_of_range()
    for name in ("tls-creds", "tls-hostname", "tls-authz"):
        if values[name]:
            raise ParameterRefused(
                name, f"Parameter '{name}' is not supported: there is no TLS; leave it empty"
            )
