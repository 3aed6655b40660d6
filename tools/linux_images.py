"""An unmodified Debian kernel and a static busybox, by apt: downloaded and unpacked, never installed.

    python -m tools.linux_images [cloud-amd64 | amd64]       fetch them and print where they are

    apt-cache depends linux-image-cloud-amd64 --> linux-image-6.1.0-56-cloud-amd64
    apt-get download NAME --> NAME.deb --dpkg -x--> build/linux/NAME/boot/vmlinuz-6.1.0-56-cloud-amd64

Needs no privileges. Where the system has no package lists, or old ones, lists of our own are fetched to
build/linux/apt. What was unpacked once is used again without asking apt.
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from tools.initramfs import busybox_entries, pack

__all__ = ["BUSYBOX", "CLOUD", "FULL", "ImagesMissing", "Kernel", "busybox", "initrd", "kernel"]

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "build" / "linux"
CLOUD, FULL = "linux-image-cloud-amd64", "linux-image-amd64"
"""Kernels for virtual machines, and for everything."""
BUSYBOX = "busybox-static"
APT_DEADLINE_S = 240.0


class ImagesMissing(Exception):
    """apt cannot provide a package; the text has its reason."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    image: pathlib.Path
    modules: pathlib.Path


def kernel(package: str = CLOUD) -> Kernel:
    """The kernel that the package (CLOUD or FULL) stands for now. Raises ImagesMissing."""
    root = _unpacked(package, is_meta=True)
    (image,) = (root / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    return Kernel(release, image, root / "lib" / "modules" / release)


def busybox() -> pathlib.Path:
    """The static busybox. Raises ImagesMissing."""
    return _unpacked(BUSYBOX) / "bin" / "busybox"


def initrd(script: str) -> pathlib.Path:
    """An initial RAM disk whose /init runs `script` under busybox's shell. Raises ImagesMissing."""
    data = pack(busybox_entries(busybox().read_bytes(), script))
    path = FOLDER / f"initrd-{hashlib.sha256(data).hexdigest()[:12]}.gz"
    if not path.exists():
        _put(path, data)
    return path


def _put(path: pathlib.Path, data: bytes) -> None:
    """Write a file that others see whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    pathlib.Path(file.name).chmod(0o644)
    pathlib.Path(file.name).rename(path)


def _unpacked(package: str, *, is_meta: bool = False) -> pathlib.Path:
    """The folder with the package's files; of a meta package: with those of the package it needs."""
    target = FOLDER / package
    if target.exists():
        return target
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise ImagesMissing("apt-get and dpkg are not here")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        try:
            _download(package, folder, (), is_meta=is_meta)
        except ImagesMissing:
            options = _own_lists()
            _download(package, folder, options, is_meta=is_meta)
        (archive,) = folder.glob("*.deb")
        (folder / "root").mkdir()
        _run("dpkg", "-x", str(archive), str(folder / "root"))
        try:
            (folder / "root").rename(target)
        except OSError:
            if not target.exists():  # another process was faster
                raise
    return target


def _download(package: str, folder: pathlib.Path, options: tuple[str, ...], *, is_meta: bool) -> None:
    if is_meta:
        lines = _run("apt-cache", *options, "depends", "--no-recommends", package).splitlines()
        needed = [line.partition(":")[2].strip() for line in lines if line.strip().startswith("Depends:")]
        if not needed:
            raise ImagesMissing(f"{package} depends on no kernel:\n" + "\n".join(lines))
        package = needed[0]
    _run("apt-get", *options, "download", package, cwd=folder)


def _own_lists() -> tuple[str, ...]:
    """Fresh package lists, kept apart from the system's; gives the options that make apt use them."""
    own = FOLDER / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (own / part).mkdir(parents=True, exist_ok=True)
    options = ("-o", f"Dir::State::Lists={own}/lists", "-o", f"Dir::Cache={own}/cache")
    _run("apt-get", *options, "-o", "APT::Update::Error-Mode=any", "update")
    return options


def _run(*command: str, cwd: pathlib.Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=APT_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ImagesMissing(f"{' '.join(command)}: no answer in {APT_DEADLINE_S:g} s") from error
    if done.returncode:
        raise ImagesMissing(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """The command."""
    try:
        found = kernel(f"linux-image-{arguments[0]}" if arguments else CLOUD)
        print(f"kernel   {found.image}\nmodules  {found.modules}\nbusybox  {busybox()}")
    except ImagesMissing as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
