"""The cffi builder of `vmm.cpu._engine`: our C, linked with the static library of the unicorn wheel.

Static, because the repairs need it: calls inside a shared library cannot be redirected from a module that
Python loads, calls between the archive's objects can, by the linker's --wrap. The symbols of the library stay
hidden, so that `import unicorn` in the same process keeps its own.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re

from cffi import FFI

from tools.native import C_FLAGS, GENERATED_FLAGS

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = [
    "clock.c",
    "halt.c",
    "instructions.c",
    "interrupts.c",
    "lifecycle.c",
    "lookups.c",
    "memory.c",
    "mmio.c",
    "other_targets.c",
    "pic.c",
    "pit.c",
    "run.c",
    "safe_point.c",
    "state.c",
    "store_log.c",
    "tick.c",
    "uart.c",
    "uart_ports.c",
    "x87.c",
]

CALLBACKS = """
extern "Python" uint32_t pf_on_port_read(void *handle, uint32_t port, uint32_t size);
extern "Python" void pf_on_port_write(void *handle, uint32_t port, uint32_t size, uint32_t value);
extern "Python" uint64_t pf_on_mmio_read(void *handle, uint64_t address, uint32_t size);
extern "Python" void pf_on_mmio_write(void *handle, uint64_t address, uint32_t size, uint64_t value);
"""


def wheel() -> pathlib.Path:
    """Where the installed unicorn wheel lies, found without importing it."""
    spec = importlib.util.find_spec("unicorn")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vmm.cpu needs the unicorn wheel (pip install unicorn==2.1.4)")
    return pathlib.Path(spec.submodule_search_locations[0])


def wrapped() -> list[str]:
    """The library routines that our C replaces: every `__wrap_NAME` in it."""
    text = "".join((HERE / name).read_text() for name in SOURCES)
    names = set(re.findall(r"__wrap_(\w+)\(", text))
    names |= set(re.findall(r"^WRAP_PHYSICAL_STORE\((\w+),", text, re.MULTILINE))
    names |= set(re.findall(r"^WRAP_PHYSICAL_LOAD\((\w+),", text, re.MULTILINE))
    names |= set(re.findall(r"^WRAP_CONSTANT\((\w+),", text, re.MULTILINE))
    names |= {f"helper_{way}{size}_x86_64" for way in ("in", "out") for size in "bwl"}
    return sorted(names)


ffibuilder = FFI()
HEADERS = ("pic.h", "pit.h", "uart.h", "engine.h")
ffibuilder.cdef(
    re.sub(r"/\*.*?\*/", "", "".join((HERE / name).read_text() for name in HEADERS), flags=re.DOTALL)
    + CALLBACKS
)
ffibuilder.set_source(
    "vmm.cpu._engine",
    '#include <stdint.h>\n#include "pic.h"\n#include "pit.h"\n#include "uart.h"\n#include "engine.h"\n',
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE), str(wheel() / "include")],
    extra_objects=[str(wheel() / "lib" / "libunicorn.a")],
    libraries=["m", "pthread"],
    extra_compile_args=[*C_FLAGS, *GENERATED_FLAGS, "-fvisibility=hidden"],
    extra_link_args=[
        "-Wl,--exclude-libs,ALL",
        "-Wl,--gc-sections",
        "-Wl,-Bsymbolic",
        *[f"-Wl,--wrap={name}" for name in wrapped()],
    ],
)
