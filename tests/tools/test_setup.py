"""The set-up: the packages it names exist, its scripts parse, and what is installed is the whole product."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.support.requires import requires

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def words(path: str) -> list[str]:
    """The lines of a list, without comments."""
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


def test_every_system_package_is_one() -> None:
    requires("apt")
    packages = words("tools/apt-packages.txt")
    shown = subprocess.run(
        ["apt-cache", "policy", *packages], capture_output=True, text=True, check=True
    ).stdout
    known = re.findall(r"^(\S+):$", shown, re.MULTILINE)
    assert sorted(known) == sorted(packages)


@pytest.mark.parametrize("script", [".ci/run", "tools/setup_check.sh"])
def test_scripts_parse_and_can_be_run(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert (ROOT / script).stat().st_mode & 0o111


def test_set_up_finds_nothing_missing_where_the_tests_run() -> None:
    done = subprocess.run([str(ROOT / "tools/setup_check.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_missing_is_named_with_the_line_that_installs_it(tmp_path: pathlib.Path) -> None:
    for tool in ("id", "bash", "env"):
        path = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / tool).symlink_to(path)
    (tmp_path / "id").unlink()
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    script = str(ROOT / "tools/setup_check.sh")
    done = subprocess.run(
        ["bash", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "apt-get install -y --no-install-recommends python3-venv python3-dev gcc binutils" in done.stderr


def test_development_pins_cover_the_products_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower() for line in words("tools/requirements.txt")}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[=<>]", want)[0].lower() for want in wanted}
    assert names <= pinned


@pytest.mark.slow
def test_the_wheel_has_the_c_modules_and_nothing_of_the_workshop(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("pageferry-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if ".dist-info" not in top} == {"qmp", "schema", "tools", "uffd", "vmm"}
    for module in ("uffd/_uffd", "vmm/migration/page_pump/_page_pump", "vmm/cpu/_engine"):
        assert any(name.startswith(f"{module}.cpython") and name.endswith(".so") for name in names), module
    sources = {
        str(path.relative_to(ROOT))
        for top in ("qmp", "schema", "uffd", "vmm")
        for path in (ROOT / top).rglob("*.py")
    }
    assert sources <= set(names)
    assert {f"schema/{path.name}" for path in (ROOT / "schema").glob("*.json")} <= set(names)
    shown = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
         "from vmm.cli import main; sys.exit(main(['-version']))"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
