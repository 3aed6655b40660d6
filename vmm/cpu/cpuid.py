"""The CPU model: what CPUID answers, as stock QEMU 7.2 TCG does for `-cpu qemu64`, and its option.

The table was recorded from stock by a guest that runs CPUID on every leaf; tests/vmm/cpu/test_cpuid.py runs
that guest on both. Not in the table means zeros. Two answers are dynamic, in C: OSXSAVE follows CR4, and
leaf 0xb gives the subleaf back.

One answer differs: there is no local APIC here, so the guest is told of none, as a CPU tells whose APIC is
disabled in IA32_APIC_BASE (Intel SDM vol. 3, 11.4.3). A Linux that is told of one sends interrupts to itself
by it, from an NMI in an idle moment for one, and waits for ever for the open bus to say that one was sent.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

from vmm.errors import OptionError

__all__ = ["ANY_SUBLEAF", "CpuModel", "CpuidEntry", "Word"]

ANY_SUBLEAF = 0xFFFFFFFF
ECX_IS_SUBLEAF = 1
ECX_HAS_OSXSAVE = 2


class Word(enum.Enum):
    """The CPUID words whose bits have names on the command line; the order is that of pf_set_cpuid."""

    LEAF_1_EDX = 0
    LEAF_1_ECX = 1
    LEAF_7_EBX = 2
    LEAF_80000001_EDX = 3
    LEAF_80000001_ECX = 4


class CpuidEntry(NamedTuple):
    """The answer to one leaf and subleaf."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    flags: int = 0


def _bits(word: Word, names: str) -> dict[str, tuple[Word, int]]:
    pairs = (item.split("=") for item in names.split())
    return {name: (word, int(bit)) for name, bit in pairs}


FEATURES: dict[str, tuple[Word, int]] = {
    **_bits(
        Word.LEAF_1_EDX,
        "fpu=0 de=2 pse=3 tsc=4 msr=5 pae=6 mce=7 cx8=8 apic=9 sep=11 mtrr=12 pge=13 mca=14 cmov=15 pat=16 "
        "pse36=17 clflush=19 acpi=22 mmx=23 fxsr=24 sse=25 sse2=26 ss=27",
    ),
    **_bits(
        Word.LEAF_1_ECX,
        "pni=0 pclmulqdq=1 monitor=3 ssse3=9 cx16=13 sse4.1=19 sse4.2=20 movbe=22 popcnt=23 aes=25 rdrand=30 "
        "hypervisor=31",
    ),
    **_bits(Word.LEAF_7_EBX, "fsgsbase=0 bmi1=3 smep=7 bmi2=8 erms=9 adx=19 smap=20 clflushopt=23 clwb=24"),
    **_bits(
        Word.LEAF_80000001_EDX,
        "syscall=11 nx=20 mmxext=22 pdpe1gb=26 rdtscp=27 lm=29 3dnowext=30 3dnow=31",
    ),
    **_bits(Word.LEAF_80000001_ECX, "lahf-lm=0 svm=2 cr8legacy=4 abm=5 sse4a=6"),
}
"""QEMU's names of the features that the engine can do."""

ALIASES = {
    "sse3": "pni",
    "sse4-1": "sse4.1",
    "sse4-2": "sse4.2",
    "xd": "nx",
    "i64": "lm",
    "altmovcr8": "cr8legacy",
}

AMD_ALIASES = 0x0183F3FF
"""Bits of 1.EDX that an AMD CPU repeats in 80000001.EDX."""

APIC = 1 << FEATURES["apic"][1]
"""In 1.EDX and, repeated, in 80000001.EDX."""

SIGNATURE = 0x60FB1
"""Family 15, model 107, stepping 1."""

QEMU64 = {
    Word.LEAF_1_EDX: 0x078BFBFD,
    Word.LEAF_1_ECX: 0x80002001,
    Word.LEAF_7_EBX: 0,
    Word.LEAF_80000001_EDX: 0x20100800,
    Word.LEAF_80000001_ECX: 0x5,
}

_VENDOR = (
    0x68747541,
    0x444D4163,
    0x69746E65,
)  # "AuthenticAMD" as leaf 0 has it: EBX, ECX, EDX

_FIXED = (
    CpuidEntry(0x0, ANY_SUBLEAF, 0xD, *_VENDOR),
    CpuidEntry(0x5, ANY_SUBLEAF, 0, 0, 3, 0),
    CpuidEntry(0x40000000, ANY_SUBLEAF, 0x40000001, 0x54474354, 0x43544743, 0x47435447),
    CpuidEntry(0x80000000, ANY_SUBLEAF, 0x8000000A, *_VENDOR),
    CpuidEntry(0x80000002, ANY_SUBLEAF, 0x554D4551, 0x72695620, 0x6C617574, 0x55504320),
    CpuidEntry(0x80000003, ANY_SUBLEAF, 0x72657620, 0x6E6F6973, 0x352E3220, 0x2B),
    CpuidEntry(0x80000005, ANY_SUBLEAF, 0x01FF01FF, 0x01FF01FF, 0x40020140, 0x40020140),
    CpuidEntry(0x80000006, ANY_SUBLEAF, 0, 0x42004200, 0x02008140, 0x00808140),
)

ON = {"on", "yes", "true", "y"}
OFF = {"off", "no", "false", "n"}
MAXIMUM_APIC_ID = 254


@dataclasses.dataclass(frozen=True)
class CpuModel:
    """qemu64 with some of its features changed. `words` are the feature words in the order of Word."""

    words: tuple[int, ...] = tuple(QEMU64[word] for word in Word)
    apic_id: int = 0

    @classmethod
    def parse(cls, text: str) -> CpuModel:
        """The model that `-cpu TEXT` means: `qemu64`, then `+feat`, `-feat`, `feat=on|off`, `apic-id=N`.

        Raises OptionError for anything else; its text says what is accepted.
        """
        name, *modifiers = text.split(",")
        if name != "qemu64":
            raise OptionError(f"CPU model '{name}' is not known; there is: qemu64", "-cpu")
        words = dict(QEMU64)
        apic_id = 0
        for modifier in modifiers:
            if modifier.startswith("apic-id="):
                apic_id = _parse_apic_id(modifier.removeprefix("apic-id="))
                continue
            (word, bit), value = _parse_feature(modifier)
            words[word] = words[word] | 1 << bit if value else words[word] & ~(1 << bit)
        return cls(tuple(words[word] for word in Word), apic_id)

    @property
    def has_apic(self) -> bool:
        """Whether a stock peer's CPU of this model has a local APIC; the guest is told of none here."""
        return bool(self.words[0] & APIC)

    @property
    def cpuid_version(self) -> int:
        """Leaf 1's EAX, which EDX holds after reset."""
        return SIGNATURE

    def translator_words(self) -> tuple[int, ...]:
        """The feature words with AMD's aliases put in, in the order of Word."""
        edx, ecx, leaf7, extended, extended_ecx = self.words
        return edx, ecx, leaf7, extended | edx & AMD_ALIASES, extended_ecx

    def table(self) -> list[CpuidEntry]:
        """Every leaf that does not answer zeros; exact subleaves come before ANY_SUBLEAF."""
        edx, ecx, leaf7, extended, extended_ecx = self.translator_words()
        edx, extended = edx & ~APIC, extended & ~APIC
        if extended >> FEATURES["lm"][1] & 1:
            address_bits = 48 << 8 | 40
        else:
            address_bits = 36 if edx >> FEATURES["pse36"][1] & 1 else 32
        svm = extended_ecx >> FEATURES["svm"][1] & 1
        return [
            *_FIXED,
            CpuidEntry(0x1, ANY_SUBLEAF, SIGNATURE, self.apic_id << 24 | 0x800, ecx, edx, ECX_HAS_OSXSAVE),
            CpuidEntry(0x7, 0, 0, leaf7, 0, 0),
            CpuidEntry(0xB, 0, 0, 1, 0x100, self.apic_id),
            CpuidEntry(0xB, 1, 0, 1, 0x200, self.apic_id, ECX_IS_SUBLEAF),
            CpuidEntry(0xB, ANY_SUBLEAF, 0, 0, 0, self.apic_id, ECX_IS_SUBLEAF),
            CpuidEntry(0x80000001, ANY_SUBLEAF, SIGNATURE, 0, extended_ecx, extended),
            CpuidEntry(0x80000008, ANY_SUBLEAF, address_bits, 0, 0, 0),
            CpuidEntry(0x8000000A, ANY_SUBLEAF, svm, svm * 0x10, 0, 0),
        ]


def _parse_apic_id(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= MAXIMUM_APIC_ID:
        raise OptionError(f"apic-id expects a number from 0 to {MAXIMUM_APIC_ID}, not '{text}'", "-cpu")
    return value


def _parse_feature(modifier: str) -> tuple[tuple[Word, int], bool]:
    """The bit that a modifier names and what it becomes."""
    name, equals, setting = modifier.partition("=")
    if not equals and modifier[:1] in "+-" and modifier:
        name, setting = modifier[1:], "on" if modifier[0] == "+" else "off"
    elif not equals:
        raise OptionError(
            f"'{modifier}' is not a modifier; expected +feature, -feature or feature=on|off", "-cpu"
        )
    if setting not in ON | OFF:
        raise OptionError(f"Feature '{name}' expects 'on' or 'off', not '{setting}'", "-cpu")
    name = name.replace("_", "-")
    name = ALIASES.get(name, name)
    if name not in FEATURES:
        known = ", ".join(sorted(FEATURES))
        raise OptionError(f"CPU feature '{name}' is not known; there are: {known}, apic-id=N", "-cpu")
    return FEATURES[name], setting in ON
