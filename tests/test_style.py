"""What a linter does not see: dead markers, unexplained exceptions, a docstring missing where one looks."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("qmp", "schema", "tests", "tools", "uffd", "vmm")
SUFFIXES = {".py", ".pyi", ".c", ".h", ".S", ".inc", ".sh", ".json"}


def files(*suffixes: str) -> list[str]:
    """The project's files with one of `suffixes`, as paths from the root; generated ones left out."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and not is_generated(path):
                found.append(str(path.relative_to(ROOT)))
    return found


def is_generated(path: pathlib.Path) -> bool:
    """True for what cffi writes beside a `_build.py`."""
    return path.suffix == ".c" and path.name.startswith("_")


def lines_with(name: str, pattern: str) -> list[str]:
    """The lines of a file that match, with their numbers."""
    text = (ROOT / name).read_text()
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(text.split("\n"), 1)
        if re.search(pattern, line)
    ]


DEAD_MARKER = r"\b(TODO|FIXME|XXX|HACK)\b(?!\([a-z])"  # style-test: the pattern itself
UNEXPLAINED = r"# (type: ignore(\[[\w, -]+\])?|noqa(: [A-Z0-9, ]+)?|pragma: no cover)\s*$"


@pytest.mark.parametrize("name", files(*SUFFIXES))
def test_no_dead_markers(name: str) -> None:
    found = [line for line in lines_with(name, DEAD_MARKER) if "style-test" not in line]
    assert not found, f"{name}: a marker needs an owner, as in TODO(name): {found}"  # style-test


@pytest.mark.parametrize("name", files(".py", ".pyi"))
def test_every_exception_to_a_check_has_its_reason(name: str) -> None:
    found = lines_with(name, UNEXPLAINED)
    assert not found, f"{name}: {found}"


@pytest.mark.parametrize("name", [name for name in files(".py") if not name.startswith("tests/")])
def test_docstrings(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    if not tree.body:
        return  # an empty __init__.py
    assert ast.get_docstring(tree), f"{name} does not say what it is for"
    bare = [
        f"{node.lineno}: {node.name}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, f"{name}: no docstring: {bare}"


@pytest.mark.parametrize("name", files(".c", ".h", ".S", ".inc"))
def test_each_c_and_assembler_file_opens_with_what_it_is_for(name: str) -> None:
    assert (ROOT / name).read_text().startswith(("/*", "//", "#")), name


def test_licence() -> None:
    assert "GNU GENERAL PUBLIC LICENSE" in (ROOT / "LICENSE").read_text()
    assert 'license = "GPL-2.0-or-later"' in (ROOT / "pyproject.toml").read_text()
