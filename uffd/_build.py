"""The cffi builder of `uffd._uffd`: api.h as it stands, and the kernel's constants by name."""

from __future__ import annotations

import pathlib
import re

from cffi import FFI

from tools.native import C_FLAGS, GENERATED_FLAGS

HERE = pathlib.Path(__file__).resolve().parent

CONSTANTS = sorted(set(re.findall(r"^#ifndef (\w+)$", (HERE / "kernel.h").read_text(), re.MULTILINE)))
CONSTANTS.remove("PAGEFERRY_UFFD_KERNEL_H")
"""Every constant that kernel.h defines."""

ADVICE = [
    "MADV_DONTNEED",
    "MADV_DONTFORK",
    "MADV_DONTDUMP",
    "MADV_HUGEPAGE",
    "MADV_NOHUGEPAGE",
    "MADV_POPULATE_READ",
]
"""What madvise(2) is asked for, from the C library's header."""

ffibuilder = FFI()
ffibuilder.cdef(
    (HERE / "api.h").read_text() + "".join(f"\n#define {name} ..." for name in [*CONSTANTS, *ADVICE])
)
ffibuilder.set_source(
    "uffd._uffd",
    '#include <sys/mman.h>\n#include "kernel.h"\n#include "api.h"\n',
    sources=[str(HERE / name) for name in sorted(p.name for p in HERE.glob("*.c") if p.name != "_uffd.c")],
    include_dirs=[str(HERE)],
    extra_compile_args=[*C_FLAGS, *GENERATED_FLAGS],
)
