"""pageferry-stream: recorded streams of stock QEMU shown, taken apart, and broken."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import struct
import sys
from typing import Any

import pytest

from tests.support.recordings import NAMES, PRECOPY, recording
from tools import stream as command
from tools.stream_walk import DESCRIPTIONS, Item, StreamBroken, walk
from vmm.vmstate import describe, encode

AUDITOR = range(0x100000, 0x100000 + 32 * 4096, 4096)


def sections(raw: bytes) -> list[Item]:
    return [item for item in walk(raw) if item.section]


@pytest.mark.parametrize("name", NAMES)
def test_every_recording_is_read_to_its_last_byte(name: str) -> None:
    items = list(walk(recording(name)))
    kinds = [item.kind for item in items]
    last = "EOF" if "postcopy" in name else "VMDESCRIPTION"
    assert kinds[:2] == ["HEADER", "CONFIGURATION"]
    assert kinds[-1] == last
    assert ("POSTCOPY_RUN" in kinds) == ("postcopy" in name)
    names = [item.section for item in items if item.section]
    assert names[0] == "timer/0"
    assert names[-1] == "globalstate/0"
    assert ("kvmclock/0" in names) == (name == "microvm-kvm")
    assert ("serial/0" in names) == ("microvm" in name)
    assert "unknown" not in " ".join(item.text for item in items)


@pytest.mark.parametrize("name", NAMES)
def test_every_device_section_is_written_again_byte_for_byte(name: str) -> None:
    raw = recording(name)
    for item in sections(raw):
        idstr = item.section.partition("/")[0]
        body = encode(DESCRIPTIONS[idstr], item.values)
        head = 1 + 4 + 1 + len(idstr) + 8
        assert raw[item.offset + head :].startswith(body + b"\x7e"), item.section


@pytest.mark.parametrize("name", PRECOPY)
def test_the_tables_say_what_stocks_own_vmdescription_says(name: str) -> None:
    items = list(walk(recording(name)))
    theirs = {f"{each['name']}/{each['instance_id']}": each for each in items[-1].values["devices"]}
    for item in (item for item in items if item.section):
        shown = describe(DESCRIPTIONS[item.section.partition("/")[0]], item.values)
        expected = {k: v for k, v in theirs[item.section].items() if k not in ("name", "instance_id")}
        assert plain(shown) == plain(expected), item.section


def plain(shown: Any) -> Any:
    """A description without what two writers may put differently.

    An array is one field or several; an unused field may have a number; x87 registers may lie in a wrapper.
    """
    if isinstance(shown, dict) and "fields" in shown:
        fields: list[Any] = []
        for each in (plain(each) for each in shown["fields"] if each.get("index", 0) == 0):
            if each["name"].startswith("unused["):
                each["name"] = "unused"
            if each["type"] == "tmp":
                fields += [{**inner, "name": inner["name"].removeprefix("tmp_")} for inner in each["fields"]]
            else:
                fields.append(each)
        return {**{k: plain(v) for k, v in shown.items() if k != "fields"}, "fields": fields}
    if isinstance(shown, dict):
        return {k: plain(v) for k, v in shown.items() if k not in ("index", "array_len")}
    if isinstance(shown, list):
        return [plain(each) for each in shown]
    return shown


@pytest.mark.parametrize("name", ["none-tcg-postcopy", "microvm-kvm"])
def test_a_cut_stream_breaks_at_the_cut(name: str) -> None:
    raw = recording(name)
    description = raw.find(b'{"page_size"') - 5
    end = len(raw) if description < 0 else description
    for cut in [*range(0, 600, 7), *range(600, end, 1999), *range(end - 600, end, 13)]:
        with pytest.raises(StreamBroken) as broken:
            list(walk(raw[:cut]))
        assert broken.value.offset <= cut
        assert f"offset {broken.value.offset}" in str(broken.value)


def test_a_damaged_stream_is_read_or_breaks_and_nothing_else() -> None:
    raw = recording("microvm-tcg-postcopy")
    for at in range(0, len(raw), 191):
        broken = bytearray(raw)
        broken[at] ^= 0x81
        with contextlib.suppress(StreamBroken):
            list(walk(bytes(broken)))


def test_what_nobody_knows_is_read_by_the_streams_description_or_up_to_its_footer() -> None:
    raw = recording("microvm-kvm").replace(b"\x08kvmclock", b"\x08kvmclick", 1)
    described = raw.replace(b'"name":"kvmclock"', b'"name":"kvmclick"')
    described = described.replace(b'"name": "kvmclock"', b'"name": "kvmclick"')
    by_name = {item.section: item for item in sections(described)}
    assert by_name["kvmclick/0"].values["clock"] > 0
    assert "kvmclock/clock_is_reliable" in by_name["kvmclick/0"].values
    by_name = {item.section: item for item in sections(raw)}
    assert len(by_name["kvmclick/0"].values["bytes"]) == 41
    assert "not known" in by_name["kvmclick/0"].text


def test_the_command_shows_extracts_and_fails(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recording("microvm-tcg"))
    assert command.main([str(path), "--pages", "--extract", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "BLOCK 'pc.bios' 65536 bytes" in shown
    assert "PAGE 'microvm.ram' 0x100000" in shown
    memory = (tmp_path / "out" / "microvm.ram.ram").read_bytes()
    assert [struct.unpack_from("<I", memory, page + 4)[0] for page in AUDITOR] == list(AUDITOR)
    devices = json.loads((tmp_path / "out" / "devices.json").read_text())
    assert devices["cpu/0"]["env.eip"] in range(0x40000, 0x43000)
    assert json.loads((tmp_path / "out" / "vmdescription.json").read_text())["page_size"] == 4096

    assert command.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == devices

    cut = recording("microvm-tcg")[:70000]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(cut)))
    assert command.main(["-"]) == 1
    assert "Broken at offset" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nothing")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "empty").write_bytes(b"")
    assert command.main([str(tmp_path / "empty")]) == 1
