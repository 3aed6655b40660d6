"""The guest builder: what each file is, and that it is made anew only when it must be."""

from __future__ import annotations

import os
import pathlib
import struct

import pytest

from tools import guest_builder
from tools.guest_builder import GUESTS, GuestBuildError, Kind, build, main

PT_LOAD = 1


@pytest.mark.parametrize("name", [n for n, g in GUESTS.items() if g.kind is not Kind.BOOT_SECTOR])
def test_elf_files_are_of_their_class_and_load_where_they_should(name: str) -> None:
    image = build(name).read_bytes()
    is_64 = GUESTS[name].kind is Kind.ELF64
    assert image[:4] == b"\x7fELF"
    assert image[4] == (2 if is_64 else 1)
    entry, table = struct.unpack_from("<QQ" if is_64 else "<II", image, 24)
    fields = struct.unpack_from("<IIQQQQQ" if is_64 else "<IIIIIII", image, table)
    kind, physical, size = fields[0], fields[4 if is_64 else 3], fields[6 if is_64 else 5]
    low = guest_builder.LOW_ADDRESS if GUESTS[name].kind is Kind.ELF32 else guest_builder.HIGH_ADDRESS
    assert kind == PT_LOAD
    assert physical == low
    assert low <= entry < low + size


@pytest.mark.parametrize(
    "name", [n for n, g in GUESTS.items() if g.kind in {Kind.ELF32, Kind.ELF64_BY_MULTIBOOT}]
)
def test_multiboot_header_is_where_loaders_look(name: str) -> None:
    image = build(name).read_bytes()[:8192]
    at = image.index(struct.pack("<I", 0x1BADB002))
    magic, flags, checksum = struct.unpack_from("<III", image, at)
    assert at % 4 == 0
    assert (magic + flags + checksum) % 2**32 == 0


def test_boot_sector_is_one() -> None:
    sector = build("dirtier_boot").read_bytes()
    assert len(sector) == 512
    assert sector[510:] == b"\x55\xaa"


@pytest.fixture
def other_output(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Guests go to a folder of the test's own."""
    monkeypatch.setattr(guest_builder, "OUTPUT", tmp_path)
    return tmp_path


def test_built_once_and_again_when_a_source_is_newer(other_output: pathlib.Path) -> None:
    first = build("hello")
    inode = first.stat().st_ino
    assert build("hello").stat().st_ino == inode
    os.utime(first, (1, 1))
    assert build("hello").stat().st_ino != inode
    assert [path.name for path in other_output.iterdir()] == ["hello.elf"]


def test_a_tools_own_words_are_in_the_error(
    other_output: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path_factory.mktemp("guests")
    (sources / "hello.S").write_text("no such instruction\n")
    monkeypatch.setattr(guest_builder, "SOURCES", sources)
    with pytest.raises(GuestBuildError, match=r"(?s)as failed.*no such instruction"):
        build("hello")


def test_a_missing_assembler_is_named_with_its_package(
    other_output: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(GuestBuildError, match="apt-get install binutils"):
        build("hello")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hello"]) == 0
    assert "build/guests/hello.elf" in capsys.readouterr().out
    assert main(["nobody"]) == 1
    assert "there are: hello" in capsys.readouterr().err
