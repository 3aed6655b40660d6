"""Capabilities and parameters: QEMU's names, ranges and texts; all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.migration.errors import MigrationRefused, ParameterRefused
from vmm.migration.params import PARAMETERS, UNSUPPORTED, Capabilities, Capability, Parameters

NAMES = [capability.value for capability in Capability]
QEMUS_NAMES = """
xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block
return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate
x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt
"""


def changes(*names: str, state: bool = True) -> list[dict[str, Any]]:
    return [{"capability": name, "state": state} for name in names]


def test_the_21_capabilities_in_order_then_ours_all_off() -> None:
    assert QEMUS_NAMES.split() == NAMES[:21]
    assert all(name.startswith("x-") for name in NAMES[21:])
    assert Capabilities().query() == changes(*NAMES, state=False)


@pytest.mark.parametrize("capability", Capability)
def test_each_capability_is_set_or_refused_with_a_reason(capability: Capability) -> None:
    capabilities = Capabilities()
    capabilities.set_one(capability.value, False)
    alone_is_no_conflict = {Capability.POSTCOPY_PREEMPT, Capability.ZERO_COPY_SEND}
    if capability in UNSUPPORTED:
        with pytest.raises(ParameterRefused) as caught:
            capabilities.set_one(capability.value, True)
        if capability not in alone_is_no_conflict:
            assert caught.value.name == capability.value
            assert UNSUPPORTED[capability] in str(caught.value)
        assert not capabilities[capability]
    else:
        needs = {Capability.POSTCOPY_RAM} if capability is Capability.POSTCOPY_PREEMPT else set()
        for needed in needs:
            capabilities.set_one(needed.value, True)
        capabilities.set_one(capability.value, True)
        assert capabilities[capability]
        assert capabilities.enabled == {capability} | needs
        capabilities.set_one(capability.value, False)
        assert not capabilities[capability]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("nope", "Parameter 'capability' does not accept value 'nope'"),
        ("postcopy-preempt", "Postcopy preempt requires postcopy-ram"),
        ("postcopy-ram postcopy-preempt compress", "Postcopy preempt not compatible with compress"),
        ("postcopy-ram x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
        ("multifd compress", "Multifd is not compatible with compress"),
        ("zero-copy-send", "Zero copy only available for non-compressed non-TLS multifd migration"),
        ("background-snapshot return-path", "Background-snapshot is not compatible with return-path"),
        (
            "background-snapshot xbzrle postcopy-ram",
            "Background-snapshot is not compatible with postcopy-ram",
        ),
        ("postcopy-ram multifd", "Postcopy is not yet compatible with multifd"),
        ("x-colo", "Capability 'x-colo' is not supported: COLO is not implemented"),
    ],
)
def test_what_cannot_be_is_refused_in_qemus_words_and_changes_nothing(names: str, text: str) -> None:
    capabilities = Capabilities()
    capabilities.set_one("events", True)
    with pytest.raises(MigrationRefused) as caught:
        capabilities.set([*changes("events", state=False), *changes(*names.split())])
    assert str(caught.value) == text
    assert capabilities.enabled == {Capability.EVENTS}


def test_postcopy_by_its_founding_name() -> None:
    capabilities = Capabilities()
    capabilities.set_one("x-postcopy-ram", True)
    assert capabilities[Capability.POSTCOPY_RAM]
    assert {"capability": "postcopy-ram", "state": True} in capabilities.query()


def test_postcopy_is_refused_with_the_hosts_reason_when_it_is_switched_on() -> None:
    reasons: list[str | None] = [None, "no userfaultfd"]
    capabilities = Capabilities(lambda: reasons.pop(0))
    capabilities.set_one("postcopy-ram", True)
    # Already on: nothing is asked again.
    capabilities.set_one("events", True)
    capabilities.set_one("postcopy-ram", False)
    with pytest.raises(ParameterRefused, match="Postcopy is not supported: no userfaultfd"):
        capabilities.set_one("postcopy-ram", True)
    assert capabilities.enabled == {Capability.EVENTS}


@given(st.lists(st.tuples(st.sampled_from([*NAMES, "x-postcopy-ram", "zz"]), st.booleans()), max_size=6))
def test_any_list_is_taken_whole_or_not_at_all(wanted: list[tuple[str, bool]]) -> None:
    capabilities = Capabilities()
    before = capabilities.enabled
    try:
        capabilities.set([{"capability": name, "state": state} for name, state in wanted])
    except ParameterRefused:
        assert capabilities.enabled == before
    else:
        for name, state in dict(wanted).items():
            if name != "postcopy-ram" and name != "x-postcopy-ram":
                assert capabilities[Capability(name)] == state
        assert not capabilities.enabled & UNSUPPORTED.keys()


DEFAULTS = {
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "compress-level": 1,
    "compress-threads": 8,
    "decompress-threads": 2,
    "compress-wait-thread": True,
    "throttle-trigger-threshold": 50,
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "cpu-throttle-tailslow": False,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "max-bandwidth": 134217728,
    "downtime-limit": 300,
    "x-checkpoint-delay": 20000,
    "block-incremental": False,
    "multifd-channels": 2,
    "xbzrle-cache-size": 67108864,
    "max-postcopy-bandwidth": 0,
    "max-cpu-throttle": 99,
    "multifd-compression": "none",
    "multifd-zlib-level": 1,
    "multifd-zstd-level": 1,
    "x-postcopy-start-time": 0,
    "x-handshake-timeout": 10_000,
    "x-peer-timeout": 30_000,
    "x-postcopy-spool-path": "",
}


def test_defaults_are_accepted_and_are_qemus() -> None:
    parameters = Parameters()
    assert parameters.query() == DEFAULTS
    parameters.set(DEFAULTS)
    for name, each in PARAMETERS.items():
        assert each.check(each.default) == parameters[name]
    assert parameters.max_bandwidth_bytes_per_s == 128 << 20
    assert parameters.max_postcopy_bandwidth_bytes_per_s == 0
    assert parameters.downtime_limit_ms == 300
    assert parameters.postcopy_start_time_ms == 0


U64 = 2**64 - 1
RANGES = [
    ("announce-initial", 0, 100000, "Parameter 'announce_initial' expects a value between 0 and 100000"),
    ("announce-max", 0, 100000, "Parameter 'announce_max' expects a value between 0 and 100000"),
    ("announce-rounds", 0, 1000, "Parameter 'announce_rounds' expects a value between 0 and 1000"),
    ("announce-step", 1, 10000, "Parameter 'announce_step' expects a value between 0 and 10000"),
    ("compress-level", 0, 9, "Parameter 'compress_level' expects a value between 0 and 9"),
    ("multifd-zlib-level", 0, 9, "Parameter 'multifd_zlib_level' expects a value between 0 and 9"),
    ("multifd-zstd-level", 0, 20, "Parameter 'multifd_zstd_level' expects a value between 0 and 20"),
    (
        "throttle-trigger-threshold",
        1,
        100,
        "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100",
    ),
    (
        "cpu-throttle-initial",
        1,
        99,
        "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99",
    ),
    (
        "max-cpu-throttle",
        20,
        99,
        "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99",
    ),
    (
        "downtime-limit",
        0,
        2000000,
        "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
]


@pytest.mark.parametrize(("name", "low", "high", "text"), RANGES)
def test_ranges(name: str, low: int, high: int, text: str) -> None:
    parameters = Parameters()
    for value in (low, high):
        parameters.set({name: value})
        assert parameters[name] == value
    for value in (low - 1, high + 1):
        with pytest.raises(ParameterRefused) as caught:
            parameters.set({"max-bandwidth": 1, name: value})
        assert str(caught.value) == text
        assert caught.value.name == name
        assert parameters.max_bandwidth_bytes_per_s == 128 << 20
    parameters.set({name: high if name != "cpu-throttle-initial" else 99})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "max-bandwidth",
            -1,
            f"Parameter 'max_bandwidth' expects an integer in the range of 0 to {U64} bytes/second",
        ),
        ("max-bandwidth", U64 + 1, "Parameter 'max-bandwidth' expects uint64"),
        ("max-bandwidth", "x", "Parameter 'max-bandwidth' expects uint64"),
        ("max-bandwidth", True, "Parameter 'max-bandwidth' expects uint64"),
        ("compress-threads", 0, "Parameter 'compress_threads' expects a value between 1 and 255"),
        ("compress-threads", 256, "Parameter 'compress-threads' expects uint8_t"),
        ("multifd-channels", 0, "Parameter 'multifd_channels' expects a value between 1 and 255"),
        ("x-checkpoint-delay", 2**32, "Parameter 'x-checkpoint-delay' expects uint32_t"),
        (
            "x-postcopy-start-time",
            -1,
            "Parameter 'x_postcopy_start_time' expects an integer in the range of 0 to 4294967295 ms",
        ),
        (
            "x-handshake-timeout",
            3_600_001,
            "Parameter 'x_handshake_timeout' expects a value between 0 and 3600000",
        ),
        (
            "x-peer-timeout",
            999,
            "Parameter 'x_peer_timeout' expects 0, or a value between 1000 and 3600000",
        ),
        (
            "xbzrle-cache-size",
            5000,
            "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size",
        ),
        (
            "xbzrle-cache-size",
            2048,
            "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size",
        ),
        ("multifd-compression", "x", "Parameter 'multifd-compression' does not accept value 'x'"),
        ("compress-wait-thread", 1, "Invalid parameter type for 'compress-wait-thread', expected: boolean"),
        ("tls-hostname", 1, "Invalid parameter type for 'tls-hostname', expected: StrOrNull"),
        ("tls-creds", "x", "Parameter 'tls-creds' is not supported: there is no TLS; leave it empty"),
        (
            "block-bitmap-mapping",
            [],
            "Parameter 'block-bitmap-mapping' is not supported: block devices have no dirty bitmaps",
        ),
        ("nope", 1, "Parameter 'nope' is unexpected"),
    ],
)
def test_bad_values(name: str, value: object, text: str) -> None:
    parameters = Parameters()
    with pytest.raises(ParameterRefused) as caught:
        parameters.set({"downtime-limit": 5, name: value})
    assert str(caught.value) == text
    assert parameters.query() == DEFAULTS


def test_null_means_no_tls() -> None:
    parameters = Parameters()
    parameters.set({"tls-creds": None})
    assert parameters["tls-creds"] == ""


@given(st.dictionaries(st.sampled_from(list(DEFAULTS)), st.integers() | st.booleans() | st.text(max_size=3)))
def test_any_dictionary_is_taken_whole_or_not_at_all(wanted: dict[str, Any]) -> None:
    parameters = Parameters()
    try:
        parameters.set(wanted)
    except ParameterRefused:
        assert parameters.query() == DEFAULTS
    else:
        assert parameters.query() == DEFAULTS | wanted


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-bandwidth", "100", 100 << 20),
        ("max-bandwidth", "64k", 64 << 10),
        ("max-bandwidth", "1G", 1 << 30),
        ("max-postcopy-bandwidth", "1", 1),
        ("max-postcopy-bandwidth", "1M", 1 << 20),
        ("xbzrle-cache-size", "1M", 1 << 20),
        ("downtime-limit", "50", 50),
        ("x-postcopy-start-time", "5000", 5000),
        ("compress-wait-thread", "off", False),
        ("multifd-compression", "zstd", "zstd"),
    ],
)
def test_values_as_typed_in_the_monitor(name: str, text: str, value: object) -> None:
    parameters = Parameters()
    parameters.set_one(name, text)
    assert parameters[name] == value


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("nope", "1", "invalid parameter value: nope"),
        ("max-bandwidth", "100x", "Invalid size 100x"),
        ("downtime-limit", "abc", "Parameter 'downtime-limit' expects uint64"),
        ("compress-wait-thread", "maybe", "Parameter 'compress-wait-thread' expects 'on' or 'off'"),
        ("multifd-compression", "x", "Parameter 'multifd-compression' does not accept value 'x'"),
    ],
)
def test_bad_values_in_the_monitor(name: str, text: str, error: str) -> None:
    with pytest.raises(ParameterRefused) as caught:
        Parameters().set_one(name, text)
    assert str(caught.value) == error
