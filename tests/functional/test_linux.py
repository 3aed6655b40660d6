"""An unmodified Debian kernel at its shell: input, time, idling, and the ways in which it ends."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import stat
import time
from collections.abc import AsyncIterator

import pytest

from tests.functional.harness import Stable
from tests.functional.linux import MACHINE, Guest, Saved, seconds_of_cpu
from tests.support.requires import requires
from tools import linux_images
from tools.initramfs import Entry, busybox_entries, pack
from tools.linux_guest import MEMORY_MIB, READY, SHELL, Console, kernel_options

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

IDLE_S = 4.0
NMIS = 30
UNKNOWN_NMI = "NMI received for unknown reason"


@contextlib.asynccontextmanager
async def guest(stable: Stable, saved: Saved, folder: pathlib.Path, *options: str) -> AsyncIterator[Guest]:
    async with Guest(stable, saved, folder, *options) as made:
        yield made


async def test_it_is_a_debian_kernel_with_interrupts_and_a_clock_of_its_own(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:
        assert "Debian" in await linux.console.run("cat /proc/version")
        interrupts = await linux.console.run("cat /proc/interrupts")
        assert "XT-PIC      timer" in interrupts
        assert "XT-PIC      ttyS0" in interrupts
        assert "Fast TSC calibration using PIT" in await linux.console.run("dmesg | grep tsc:")


async def test_input_longer_than_the_fifo_arrives_whole(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(3000))
    async with guest(stable, saved_linux, tmp_path) as linux:
        assert (await linux.console.run(f"echo {text}")).strip() == text


async def test_an_idle_guest_leaves_the_processor_alone(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:
        await linux.console.run("true")
        assert await seconds_of_cpu(linux.machine, IDLE_S) < 0.03 * IDLE_S


async def test_time_passes_as_on_the_host(stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:

        async def both() -> tuple[float, float, float]:
            """The guest's clock, and the host's before and after it was read."""
            before = time.monotonic()
            uptime = await linux.console.run("adjtimex >/dev/null; read up rest < /proc/uptime; echo $up")
            return float(uptime), before, time.monotonic()

        here, _, since = await both()
        await asyncio.sleep(3)
        there, before, after = await both()
        assert before - since - 0.02 <= there - here <= after - since + 0.5


async def test_a_reboot_is_a_reset(stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:
        linux.console.write("reboot -f\n")
        event = await linux.machine.wait_event("RESET")
        assert event["data"] == {"guest": True, "reason": "guest-reset"}
        assert (await linux.machine.qmp("query-status"))["status"] == "running"


async def test_a_reboot_ends_a_machine_that_shall_not(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    async with guest(stable, saved_linux, tmp_path, "-no-reboot") as linux:
        linux.console.write("reboot -f\n")
        assert await linux.machine.wait_exit() == 0
        event = await linux.machine.wait_event("SHUTDOWN")
        assert event["data"] == {"guest": True, "reason": "guest-reset"}


async def test_a_panic_reboots_as_the_command_line_says(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    async with guest(stable, saved_linux, tmp_path, "-action", "reboot=shutdown,shutdown=pause") as linux:
        linux.console.write("dmesg -n 7; echo c > /proc/sysrq-trigger\n")
        await linux.machine.wait_run_state("shutdown")
        assert "Kernel panic - not syncing: sysrq triggered crash" in linux.text


async def test_a_reset_by_the_host_boots_it_again(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:
        await linux.console.run("true")
        await linux.machine.qmp("system_reset")
        await linux.machine.wait_event(
            "RESET", lambda event: event["data"]["reason"] == "host-qmp-system-reset"
        )
        await linux.wait(lambda: "READY\n" in linux.text)


async def nmi(linux: Guest) -> None:
    """One that the guest tells of."""
    before = linux.text.count(UNKNOWN_NMI)
    await linux.machine.qmp("inject-nmi")
    await linux.wait(lambda: linux.text.count(UNKNOWN_NMI) > before)


async def test_every_nmi_reaches_the_guest(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    """Most find it idle, its tick stopped: what they print has to wait for the next one."""
    async with guest(stable, saved_linux, tmp_path) as linux:
        await linux.console.run("dmesg -n 7")
        for _ in range(NMIS):
            await nmi(linux)
        assert f"NMI: {NMIS:10}" in await linux.console.run("grep NMI /proc/interrupts")


async def test_guest_memory_is_saved_by_its_virtual_address(
    stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path
) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:
        line = await linux.console.run("grep ' linux_banner$' /proc/kallsyms")
        address = int(line.split()[0], 16) - (1 << 64)  # QMP's integers are signed
        path = linux.machine.folder / "banner"
        await linux.machine.qmp("memsave", val=address, size=64, filename=str(path))
        assert path.read_bytes().startswith(b"Linux version 6.1")


async def test_a_core_file_of_the_guest(stable: Stable, saved_linux: Saved, tmp_path: pathlib.Path) -> None:
    async with guest(stable, saved_linux, tmp_path) as linux:
        path = linux.machine.folder / "core"
        await linux.machine.qmp("dump-guest-memory", paging=False, protocol=f"file:{path}")
        await linux.machine.wait_event("DUMP_COMPLETED")
        core = path.read_bytes()
        assert b"Linux version 6.1" in core
        assert len(core) > MEMORY_MIB << 20
        assert await linux.console.run("echo on it goes") == "on it goes\n"


async def test_a_panic_is_told_by_pvpanic(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("linux")
    modules = linux_images.kernel().modules / "kernel" / "drivers" / "misc" / "pvpanic"
    names = ("pvpanic.ko", "pvpanic-mmio.ko")
    script = "".join(f"insmod /{name}\n" for name in names) + SHELL
    entries = busybox_entries(linux_images.busybox().read_bytes(), script)
    entries += [Entry(name, stat.S_IFREG | 0o644, (modules / name).read_bytes()) for name in names]
    options = kernel_options()
    options[options.index("-initrd") + 1] = str(tmp_path / "initrd")
    (tmp_path / "initrd").write_bytes(pack(entries))
    async with Console(tmp_path / "console") as console:
        machine = await stable.start(
            "panic", *MACHINE, *options, "-device", "pvpanic", "-action", "panic=pause", serial=console.option
        )
        await console.wait(READY)
        console.write("echo c > /proc/sysrq-trigger\n")
        assert (await machine.wait_event("GUEST_PANICKED"))["data"] == {"action": "pause"}
        await machine.wait_run_state("guest-panicked")
