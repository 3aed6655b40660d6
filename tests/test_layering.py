"""The house has floors: reads every import and fails on an arrow that does not point down.

vmm/app.py, vmm/cli.py       the composition root
vmm/control/ vmm/chardev/    QMP commands and events; character backends on asyncio
vmm/migration/               the migration stack
vmm/client/                  for users in other processes
vmm/ (the rest)              the machine
qmp/        uffd/            libraries that know nothing of VMs, nor of each other
schema/                      data
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("qmp", "schema", "uffd", "vmm")

FLOORS = [
    ("root", 6, ("vmm.app", "vmm.cli", "vmm.__main__")),
    ("control", 5, ("vmm.control",)),
    ("chardev", 5, ("vmm.chardev",)),
    ("client", 4, ("vmm.client",)),
    ("migration", 4, ("vmm.migration",)),
    ("machine", 3, ("vmm",)),
    ("qmp", 2, ("qmp",)),
    ("uffd", 2, ("uffd",)),
    ("schema", 1, ("schema",)),
]
"""Name, height, module prefixes; the first that fits counts."""

KNOWS_QMP = {"root", "control", "chardev", "client", "qmp"}
"""The floors that may import qmp and schema: the machine is driven by plain calls and knows no JSON.
A chardev opens its sockets as monitors do."""

COMPUTES = {
    f"vmm.migration.{name}"
    for name in (
        "status",
        "postcopy_state",
        "params",
        "wire",
        "stream",
        "return_path",
        "pages",
        "converge",
        "stats",
        "commands",
        "errors",
        "field_reader",
        "ram_records",
        "rate_limit",
        "uri",
        "vmdescription",
    )
}
"""Files that compute and touch nothing."""

TOUCHES = {
    *("asyncio", "ctypes", "mmap", "os", "select", "selectors", "signal", "socket"),
    *("subprocess", "threading.Thread", "time", "uffd", "unicorn"),
}
"""What they may not import. A lock that guards a state is no touch; a thread is."""

OWNERS = {
    "unicorn": {"vmm.cpu._build", "vmm.cpu.engine", "vmm.cpu.library"},
    "uffd._uffd": {"uffd"},
    "vmm.cpu._engine": {"vmm.cpu"},
    "vmm.migration.page_pump._page_pump": {"vmm.migration.page_pump"},
    "aiohttp": {"qmp.http"},
    "jsonschema": {"qmp", "schema"},
    "cffi": {"uffd._build", "vmm.cpu._build", "vmm.migration.page_pump._build"},
}
"""What only one place may import: module -> the modules or packages that own it."""

C_MODULES = ("uffd._uffd", "vmm.cpu._engine", "vmm.migration.page_pump._page_pump")


def module_name(path: pathlib.Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> Iterator[tuple[str, pathlib.Path]]:
    """Every Python file of the packages, with its module name."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield module_name(path), path


def imports(module: str, path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with the line; names imported count as modules."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def within(module: str, prefix: str) -> bool:
    """True if `module` is `prefix` or lies below it."""
    return module == prefix or module.startswith(prefix + ".")


def floor(module: str) -> tuple[str, int] | None:
    """Name and height of the floor of `module`, None if it is not ours."""
    for name, height, prefixes in FLOORS:
        if any(within(module, prefix) for prefix in prefixes):
            return name, height
    return None


MODULES = dict(sources())


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    here = floor(module)
    assert here is not None
    wrong = []
    for imported, line in imports(module, MODULES[module]):
        there = floor(imported)
        if within(imported, "tools.native") and module.endswith("._build"):
            continue  # the compiler's flags, at build time
        if within(imported, "tools") or within(imported, "tests"):
            wrong.append(f"line {line}: {imported} is not part of the product")
        elif there is None or there[0] == here[0]:
            continue
        elif there[1] >= here[1] and (imported in MODULES or imported.rpartition(".")[0] in MODULES):
            wrong.append(f"line {line}: {here[0]} -> {there[0]} ({imported})")
        elif there[0] in {"qmp", "schema"} and here[0] not in KNOWS_QMP:
            wrong.append(f"line {line}: {here[0]} knows no QMP ({imported})")
    assert not wrong, f"{module}: " + "; ".join(wrong)


@pytest.mark.parametrize("module", sorted(COMPUTES & set(MODULES)))
def test_what_computes_touches_nothing(module: str) -> None:
    found = [f"line {line}: {name}" for name, line in imports(module, MODULES[module]) if name in TOUCHES]
    found += ["threading.Thread"] if "threading.Thread" in MODULES[module].read_text() else []
    assert not found, f"{module}: " + "; ".join(found)


@pytest.mark.parametrize("owned", OWNERS)
def test_one_owner(owned: str) -> None:
    users = {
        module
        for module, path in MODULES.items()
        for imported, _ in imports(module, path)
        if within(imported, owned) and not any(within(module, owner) for owner in OWNERS[owned])
    }
    assert not users, f"{owned} belongs to {OWNERS[owned]}, imported by {users}"


@pytest.mark.parametrize("extension", C_MODULES)
def test_one_file_imports_each_c_module(extension: str) -> None:
    files = {
        module
        for module, path in MODULES.items()
        for imported, _ in imports(module, path)
        if within(imported, extension)
    }
    assert len(files) <= 1, f"{extension} is imported by {sorted(files)}"


SOCKETS = {
    "vmm.migration.channel_sockets",  # opens them
    "vmm.migration.channel_types",  # looks at what came, shuts down
    "vmm.migration.lobby",  # lets strangers wait
    "vmm.migration.resolve",  # names to addresses
    "vmm.migration.byte_stream",  # how much may wait in the kernel
}


def test_sockets_of_migration_stay_in_the_files_of_the_channel() -> None:
    users = {
        module
        for module, path in MODULES.items()
        for imported, _ in imports(module, path)
        if imported == "socket" and within(module, "vmm.migration")
    }
    assert users <= SOCKETS, users - SOCKETS


def test_the_machine_knows_no_asyncio() -> None:
    users = {
        module
        for module, path in MODULES.items()
        for imported, _ in imports(module, path)
        if within(imported, "asyncio") and floor(module) in {("machine", 3), ("migration", 4)}
    }
    assert not users, users


@pytest.mark.parametrize(
    ("module", "imported", "fits"),
    [("vmm.ram", "vmm", True), ("vmm.ramp", "vmm.ram", False), ("vmm.ram", "vmm.ram", True)],
)
def test_within(module: str, imported: str, fits: bool) -> None:
    assert within(module, imported) is fits
