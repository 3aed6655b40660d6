"""cffi builder of the page pump; the declarations are read from page_pump.h itself."""

from __future__ import annotations

import pathlib

from cffi import FFI

from tools.native import C_FLAGS, GENERATED_FLAGS

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = (
    "bitmap.c",
    "io.c",
    "return_path.c",
    "source.c",
    "zeros.c",
    "discard.c",
    "load.c",
    "place.c",
    "listen.c",
    "blocktime.c",
    "xbzrle.c",
    "checksum.c",
    "preempt.c",
    "multifd.c",
    "ahead.c",
    "helper.c",
    "keeper.c",
)

ffibuilder = FFI()
_header = (HERE / "page_pump.h").read_text()
ffibuilder.cdef(_header.split("/* cdef begin */")[1].split("/* cdef end */")[0])
ffibuilder.set_source(
    "vmm.migration.page_pump._page_pump",
    '#include "page_pump.h"',
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    extra_compile_args=[*C_FLAGS, "-O3", *GENERATED_FLAGS],
    libraries=["pthread"],
)
