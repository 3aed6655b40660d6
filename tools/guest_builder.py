"""Assembles the guests of `tools/guests/` into `build/guests/`, those that are out of date.

    python -m tools.guest_builder            all of them
    python -m tools.guest_builder auditor    only this one

Three kinds: ELF32 files entered in flat protected mode (at 0x40000, below the memory they work on),
ELF64 files entered in long mode (at 24 MiB) and 512-byte boot sectors. The ELF32 ones carry a multiboot
header, so that `qemu-system-x86_64 -M pc -kernel FILE -append TEXT` runs the very same file.
"""

from __future__ import annotations

import enum
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tools" / "guests"
OUTPUT = ROOT / "build" / "guests"


class Kind(enum.Enum):
    """How a guest is entered."""

    ELF32 = "elf32"
    ELF64 = "elf64"
    ELF64_BY_MULTIBOOT = "elf64 by multiboot"
    BOOT_SECTOR = "boot sector"


@dataclass(frozen=True)
class Guest:
    """One guest: its source below `tools/guests/`, its file below `build/guests/`."""

    source: str
    output: str
    kind: Kind


GUESTS = {
    "hello": Guest("hello.S", "hello.elf", Kind.ELF32),
    "dirtier": Guest("dirtier.S", "dirtier.elf", Kind.ELF32),
    "dirtier_boot": Guest("dirtier_boot.S", "dirtier.img", Kind.BOOT_SECTOR),
    "auditor": Guest("auditor.S", "auditor.elf", Kind.ELF32),
    "filler": Guest("filler.S", "filler.elf", Kind.ELF32),
    "prober": Guest("prober.S", "prober.elf", Kind.ELF32),
    "ports": Guest("ports.S", "ports.elf", Kind.ELF32),
    "longmode": Guest("longmode.S", "longmode.elf", Kind.ELF64),
    "longmode_multiboot": Guest("longmode.S", "longmode-multiboot.elf", Kind.ELF64_BY_MULTIBOOT),
}
"""Name -> guest. `longmode_multiboot` enters long mode by itself: stock QEMU loads no ELF64 by multiboot."""

LOW_ADDRESS = 0x40000
HIGH_ADDRESS = 24 << 20
BOOT_ADDRESS = 0x7C00
SECTOR_BYTES = 512

LINKING = {
    Kind.ELF32: (["--32"], ["-m", "elf_i386", f"-Ttext={LOW_ADDRESS:#x}"], None),
    Kind.BOOT_SECTOR: (["--32"], ["-m", "elf_i386", f"-Ttext={BOOT_ADDRESS:#x}"], "binary"),
    Kind.ELF64: (["--64"], ["-m", "elf_x86_64", f"-Ttext={HIGH_ADDRESS:#x}"], None),
    Kind.ELF64_BY_MULTIBOOT: (
        ["--64", "--defsym", "MULTIBOOT=1"],
        ["-m", "elf_x86_64", f"-Ttext={HIGH_ADDRESS:#x}", "-z", "max-page-size=4096"],
        "elf32-i386",
    ),
}
"""Kind -> assembler flags, linker flags, and the format to copy the linked file to, if any."""


class GuestBuildError(Exception):
    """A tool failed, or its result cannot be used; the text has the tool's own words."""


def is_current(output: pathlib.Path) -> bool:
    """True if `output` is newer than every guest source and this file."""
    if not output.exists():
        return False
    made_from = [*SOURCES.iterdir(), pathlib.Path(__file__)]
    return all(path.stat().st_mtime <= output.stat().st_mtime for path in made_from)


def _run(*command: str | pathlib.Path) -> None:
    """Run one tool; raises GuestBuildError with its output."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise GuestBuildError(f"{command[0]} is not installed (apt-get install binutils)") from error
    except subprocess.CalledProcessError as error:
        raise GuestBuildError(f"{command[0]} failed:\n{error.stderr}") from error


def build(name: str) -> pathlib.Path:
    """Return the file of guest `name`, assembled now if it is out of date.

    Safe to call from several processes at once. Raises GuestBuildError.
    """
    guest = GUESTS[name]
    output = OUTPUT / guest.output
    if is_current(output):
        return output
    assembler_flags, linker_flags, copy_to = LINKING[guest.kind]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as scratch_name:
        scratch = pathlib.Path(scratch_name)
        assembled, linked = scratch / "guest.o", scratch / "guest.elf"
        _run(
            "as", *assembler_flags, "--fatal-warnings", "-I", SOURCES, "-o", assembled, SOURCES / guest.source
        )
        _run("ld", *linker_flags, "-N", "--no-warn-rwx-segments", "-e", "_start", "-o", linked, assembled)
        if copy_to is not None:
            copied = scratch / "guest.copied"
            _run("objcopy", "-O", copy_to, linked, copied)
            linked = copied
        if guest.kind is Kind.BOOT_SECTOR and linked.stat().st_size != SECTOR_BYTES:
            raise GuestBuildError(
                f"{guest.source} has {linked.stat().st_size} bytes, a sector {SECTOR_BYTES}"
            )
        linked.chmod(0o644)
        linked.rename(output)
    return output


def main(arguments: list[str]) -> int:
    """Command line: names of guests, none for all."""
    unknown = [name for name in arguments if name not in GUESTS]
    if unknown:
        print(f"Unknown guest {unknown[0]!r}; there are: {', '.join(GUESTS)}", file=sys.stderr)
        return 1
    for name in arguments or GUESTS:
        try:
            path = build(name)
        except GuestBuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {path.relative_to(ROOT)} ({path.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
