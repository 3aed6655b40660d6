"""Builds the C modules: each package that has one names its cffi builder in `_build.py`.

    python -m tools.native            all of them, in place, those that are out of date
    python -m tools.native uffd cpu   only these
    python -m tools.native --force    also those that are up to date

A module is out of date when it is older than a C file, a header or a Python file of its own
folder, or was built for another Python. setuptools runs the same code through `BuildNative`.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import sys
import sysconfig
import tempfile
from typing import Any

from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent.parent

MODULES = {
    "uffd": "uffd",
    "page_pump": "vmm/migration/page_pump",
    "cpu": "vmm/cpu",
}
"""Short name -> folder whose `_build.py` has a module-level `ffibuilder`."""

C_FLAGS = ["-std=gnu11", "-O2", "-g1", "-Wall", "-Wextra", "-Werror"]
"""The flags of our own C. cffi's generated wrapper is compiled with them too."""

GENERATED_FLAGS = ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]
"""Warnings that cffi's generated code raises, not ours."""


def suffix() -> str:
    """The file name ending of a C module for this Python."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def load_builder(folder: pathlib.Path) -> Any:
    """Run `_build.py` by its path: importing it through its package would need what it is to build."""
    spec = importlib.util.spec_from_file_location(f"build_{folder.name}", folder / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ffibuilder


def is_current(folder: pathlib.Path, output: pathlib.Path) -> bool:
    """True if `output` is newer than everything it is made from."""
    if not output.exists():
        return False
    generated = output.name.split(".")[0] + ".c"
    sources = [p for p in folder.iterdir() if p.suffix in {".c", ".h"} and p.name != generated]
    sources += [folder / "_build.py", pathlib.Path(__file__)]
    return all(p.stat().st_mtime <= output.stat().st_mtime for p in sources)


def build(name: str, *, force: bool = False, destination: pathlib.Path = ROOT) -> pathlib.Path:
    """Compile one module and return its path below `destination`."""
    sys.path.insert(0, str(ROOT))
    folder = ROOT / MODULES[name]
    ffibuilder = load_builder(folder)
    qualified: str = ffibuilder._assigned_source[0]
    output = ROOT / (qualified.replace(".", "/") + suffix())
    if force or not is_current(folder, output):
        with tempfile.TemporaryDirectory() as scratch:
            compiled = pathlib.Path(ffibuilder.compile(tmpdir=scratch, verbose=False))
            staged = output.with_suffix(f".new{id(compiled)}")
            shutil.copy(compiled, staged)
            staged.rename(output)  # a process that has the old one mapped keeps it
    if destination == ROOT:
        return output
    copy = destination / output.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(output, copy)
    return copy


class BuildNative(build_ext):
    """setuptools' `build_ext`, made to build the cffi modules (used by `pip install`)."""

    def run(self) -> None:
        """Build all modules into the tree (editable install) or into the build folder."""
        destination = ROOT if self.inplace or self.editable_mode else pathlib.Path(self.build_lib)
        for name in MODULES:
            build(name, destination=destination)

    def get_outputs(self) -> list[str]:
        """Nothing that setuptools should copy by itself."""
        return []


def main(arguments: list[str]) -> int:
    """Command line: names of modules, `--force`."""
    names = [a for a in arguments if a != "--force"] or list(MODULES)
    unknown = [n for n in names if n not in MODULES]
    if unknown:
        print(f"Unknown module {unknown[0]!r}; there are: {', '.join(MODULES)}", file=sys.stderr)
        return 1
    for name in names:
        path = build(name, force="--force" in arguments)
        print(f"{name}: {path.relative_to(ROOT)} ({path.stat().st_size // 1024} KiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
