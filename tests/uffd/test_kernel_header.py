"""uffd/kernel.h against the kernel's own headers, as far as these go."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

from uffd._build import CONSTANTS
from uffd._native import lib
from uffd.userfaultfd import Features, Mode

UFFD = pathlib.Path(__file__).resolve().parents[2] / "uffd"

STRUCTS = {
    "uffdio_api": ("api", "features", "ioctls"),
    "uffdio_range": ("start", "len"),
    "uffdio_register": ("range", "mode", "ioctls"),
    "uffdio_copy": ("dst", "src", "len", "mode", "copy"),
    "uffdio_zeropage": ("range", "mode", "zeropage"),
    "uffdio_writeprotect": ("range", "mode"),
    "uffd_msg": ("event", "arg.pagefault.flags", "arg.pagefault.address"),
}
"""Those that every header since Linux 5.19 has."""

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="gcc is not installed; apt-get install gcc"
)


def program() -> str:
    lines = [
        "#include <stddef.h>",
        "#include <linux/userfaultfd.h>",
        "#include <linux/fs.h>",
        "static int in_header[] = {",
        *(
            f"#ifdef {name}\n{getattr(lib, name):#x} == (unsigned long)({name}),\n#endif"
            for name in CONSTANTS
        ),
        "};",
        *(
            f"#ifdef {name}\n_Static_assert({getattr(lib, name):#x} == (unsigned long)({name}), "
            f'"{name}");\n#endif'
            for name in CONSTANTS
        ),
        '#include "kernel.h"',
    ]
    for name, fields in STRUCTS.items():
        lines.append(f'_Static_assert(sizeof(struct {name}) == sizeof(struct pf_{name}), "size of {name}");')
        lines += [
            f"_Static_assert(offsetof(struct {name}, {field}) == offsetof(struct pf_{name}, {field}), "
            f'"{name}.{field}");'
            for field in fields
        ]
    return "\n".join([*lines, "int main(void) { return sizeof in_header / sizeof in_header[0]; }\n"])


def test_constants_and_layouts_are_the_kernel_headers_own(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "compare"
    compiler = ["gcc", "-std=gnu11", "-Wno-unused-variable", f"-I{UFFD}", "-x", "c", "-", "-o", str(output)]
    done = subprocess.run(compiler, input=program(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    in_header = subprocess.run([output], check=False).returncode
    assert in_header >= 25  # what Linux 5.19's has of them: the comparison did compare


@pytest.mark.parametrize("feature", Features)
def test_features_have_the_kernels_bits(feature: Features) -> None:
    assert getattr(lib, f"UFFD_FEATURE_{feature.name}") == feature


@pytest.mark.parametrize("mode", Mode)
def test_modes_have_the_kernels_bits(mode: Mode) -> None:
    assert getattr(lib, f"UFFDIO_REGISTER_MODE_{mode.name}") == mode.value


def test_scan_argument_is_96_bytes() -> None:
    assert lib.PAGEMAP_SCAN == 0xC0606610  # _IOWR('f', 16, 96 bytes)
