"""Other ways to boot Linux: the full Debian kernel, and a vmlinux by its PVH note."""

from __future__ import annotations

import pathlib
import shutil
import struct
import subprocess

import pytest

from tests.functional.harness import Stable
from tests.support.requires import requires
from tools import linux_images
from tools.linux_guest import READY, Console, kernel_options

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]


async def says_ready(stable: Stable, console: Console, *options: str) -> None:
    await stable.start("kernel", "-M", "microvm", *options, serial=console.option)
    await console.wait(READY, 60.0)
    assert "Debian" in await console.run("cat /proc/version")
    assert "PnP ACPI: found 2 devices" in await console.run("dmesg")


async def test_the_full_kernel(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("linux")
    try:
        options = kernel_options(package=linux_images.FULL)
    except linux_images.ImagesMissing as error:
        pytest.skip(str(error))
    options[1] = "256M"
    async with Console(tmp_path / "console") as console:
        await says_ready(stable, console, *options)


def unpacked(image: bytes, folder: pathlib.Path) -> pathlib.Path:
    """The ELF file within a bzImage: Linux Documentation/x86/boot.rst, payload_offset."""
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    packed, vmlinux = folder / "vmlinux.lz4", folder / "vmlinux"
    packed.write_bytes(image[start : start + length - 4])  # its size comes last
    subprocess.run(["lz4", "-dqf", str(packed), str(vmlinux)], check=True)
    return vmlinux


async def test_a_vmlinux_by_its_pvh_note(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("linux")
    if shutil.which("lz4") is None:
        pytest.skip("lz4 is not installed (apt-get install lz4)")
    options = kernel_options()
    at = options.index("-kernel") + 1
    options[at] = str(unpacked(pathlib.Path(options[at]).read_bytes(), tmp_path))
    async with Console(tmp_path / "console") as console:
        await says_ready(stable, console, *options)
