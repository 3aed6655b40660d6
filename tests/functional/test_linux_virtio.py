"""The Debian kernel with a disk, a console and random numbers by virtio: they work, and they move."""

from __future__ import annotations

import asyncio
import hashlib
import pathlib
import re
import stat
import tempfile
from collections.abc import Iterator

import pytest

from tests.functional.harness import VM, Pair, Stable
from tests.support.requires import requires
from tools import linux_images
from tools.initramfs import Entry, busybox_entries, pack
from tools.linux_guest import APPEND, READY, SHELL, Console
from tools.vm_process import StockVM

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

MIB = 1 << 20
DISK_BYTES = 16 * MIB
SECTION_FULL = 4
MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_mmio.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/char/hw_random/virtio-rng.ko",
    "drivers/char/virtio_console.ko",
)
"""In the order of their dependencies."""
FILES = """
write() {
    i=0
    while [ $i -lt $1 ]; do
        i=$((i+1))
        seq $((i*9)) $((i*9+20000)) > /mnt/f$((i%6))
        sync; echo 3 > /proc/sys/vm/drop_caches
        sum=$(cat /mnt/f* | sha256sum); random=$(head -c 64 /dev/hwrng | wc -c)
        echo "T $i ${sum%% *} $random"; echo "H $i" > /dev/hvc0
    done
}
dmesg -n 1
stty -F /dev/hvc0 raw -echo
"""
"""Each round writes to the disk, reads all of it back from there, and asks for random bytes."""
DEVICES = (
    *("-m", "64M", "-global", "virtio-mmio.force-legacy=false", "-device", "virtio-rng-device"),
    *("-device", "virtio-serial-device", "-device", "virtconsole,chardev=c0"),
)
DISK_DEVICE = ("-device", "virtio-blk-device,drive=d0,serial=PAGEFERRY-1")
CONFIG_BEGIN, CONFIG_END = 24, 24 + 57
"""Where a section has the configuration space: stock's is empty until the driver has read it."""
STOCK_MACHINE = "microvm,acpi=off,ioapic2=off,pit=on,pic=on,rtc=on,isa-serial=on"


@pytest.fixture(scope="module")
def initrd() -> Iterator[pathlib.Path]:
    """The modules are loaded before the shell is there."""
    requires("linux")
    kernel = linux_images.kernel()
    modules = [kernel.modules / "kernel" / name for name in MODULES]
    load = "".join(f"insmod /{path.name}\n" for path in modules)
    entries = busybox_entries(linux_images.busybox().read_bytes(), load + FILES + SHELL)
    entries += [Entry(path.name, stat.S_IFREG | 0o644, path.read_bytes()) for path in modules]
    with tempfile.NamedTemporaryFile(suffix=".gz") as file:
        file.write(pack(entries))
        file.flush()
        yield pathlib.Path(file.name)


def options(initrd: pathlib.Path, disk: pathlib.Path, hvc: str) -> list[str]:
    """The machine, but for its serial port; `hvc` is a chardev."""
    kernel = linux_images.kernel()
    boot = ["-kernel", str(kernel.image), "-initrd", str(initrd), "-append", APPEND]
    return [
        *("-M", "microvm", "-m", "128M", *boot, "-global", "virtio-mmio.force-legacy=false"),
        *("-device", "virtio-rng-device", "-drive", f"file={disk},format=raw,if=none,id=d0"),
        *("-device", "virtio-blk-device,drive=d0,serial=PAGEFERRY-1"),
        *("-chardev", f"{hvc},id=c0", "-device", "virtio-serial-device", "-device", "virtconsole,chardev=c0"),
    ]


def virtio_bodies(stream: bytes) -> dict[str, bytes]:
    """The bodies of a stream's virtio sections, by their names."""
    found = {}
    for match in re.finditer(rb"virtio-mmio@[0-9a-f]{16}/[a-z-]+", stream):
        length_at = match.start() - 1
        if stream[length_at] != len(match[0]) or stream[length_at - 5] != SECTION_FULL:
            continue  # in the vmdescription
        section_id = stream[length_at - 4 : length_at]
        begin = match.end() + 8
        found[match[0].decode()] = stream[begin : stream.index(b"\x7e" + section_id, begin)]
    return found


def empty_disk(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


class Machines:
    """One guest on one machine after the other, with one disk."""

    def __init__(self, stable: Stable, initrd: pathlib.Path, folder: pathlib.Path) -> None:
        self._stable = stable
        self._initrd = initrd
        self._folder = folder
        self.disk = empty_disk(folder)
        self.consoles: list[Console] = []

    @property
    def console(self) -> Console:
        return self.consoles[-1]

    @property
    def text(self) -> str:
        return b"".join(bytes(console.raw) for console in self.consoles).decode("latin-1").replace("\r", "")

    @property
    def said_on_hvc(self) -> str:
        paths = [self._folder / f"hvc{number}" for number in range(len(self.consoles))]
        return "".join(path.read_text() for path in paths)

    async def start(self, *more: str, kind: type[VM] = VM) -> VM:
        number = len(self.consoles)
        console = await Console(self._folder / f"console{number}").__aenter__()
        wanted = options(self._initrd, self.disk, f"file,path={self._folder}/hvc{number}")
        if kind is StockVM:
            wanted[1] = STOCK_MACHINE
        machine = await self._stable.start(
            f"virtio{number}", *wanted, *more, kind=kind, serial=console.option
        )
        self.consoles.append(console)
        return machine

    async def move(self, source: VM, *, postcopy: bool = False, kind: type[VM] = VM) -> VM:
        destination = await self.start("-incoming", "defer", kind=kind)
        pair = Pair(source, destination)
        if postcopy:
            await source.qmp("migrate-set-parameters", max_bandwidth=32 * MIB, max_postcopy_bandwidth=0)
            await pair.postcopy()
        else:
            await pair.set_capabilities(postcopy_ram=False)
            await source.qmp("migrate-set-parameters", max_bandwidth=1 << 34)
            await pair.precopy()
        await source.close()
        return destination

    async def says_rounds(self, more: int) -> None:
        """Wait until the guest has told of so many rounds more."""
        wanted = self.text.count("\nT ") + more
        await self.console.wait(lambda _: self.text.count("\nT ") >= wanted, 60.0)

    async def close(self) -> None:
        for console in self.consoles:
            await console.__aexit__()


async def test_a_file_system_a_console_and_random_numbers(
    stable: Stable, initrd: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    machines = Machines(stable, initrd, tmp_path)
    machine = await machines.start(*4 * ("-device", "virtio-rng-device"))
    shell = machines.console
    await shell.wait(READY)
    assert await shell.run("cat /sys/block/vda/serial") == "PAGEFERRY-1"
    await shell.run("mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /tmp && mkdir /mnt")
    text = await shell.run("seq 100000 > /tmp/numbers && sha256sum /tmp/numbers && umount /tmp")
    again = await shell.run("mount -t ext4 -o ro /dev/vda /tmp && sha256sum /tmp/numbers && umount /tmp")
    assert text == again
    assert int(await shell.run("head -c 1000 /dev/hwrng | wc -c")) == 1000
    await shell.run("echo hello > /dev/hvc0")
    async with asyncio.timeout(60):
        while machines.said_on_hvc != "hello\n":
            await asyncio.sleep(0.01)
    interrupts = await shell.run("grep virtio /proc/interrupts")
    assert interrupts.count("XT-PIC      virtio") == 7, "all devices have a line of their own"
    (disk,) = await machine.qmp("query-block")
    assert (disk["device"], disk["inserted"]["ro"]) == ("d0", False)
    assert disk["inserted"]["image"]["virtual-size"] == DISK_BYTES
    await machine.qmp("system_powerdown")
    assert "XT-PIC      acpi" in await shell.run("grep -v ' 0 .*acpi' /proc/interrupts")
    shell.write("poweroff -f\n")
    event = await machine.wait_event("SHUTDOWN")
    assert event["data"] == {"guest": True, "reason": "guest-shutdown"}, "by ACPI"
    assert await machine.wait_exit() == 0
    assert b"88888" in machines.disk.read_bytes()
    await machines.close()


async def test_input_of_the_console(stable: Stable, initrd: pathlib.Path, tmp_path: pathlib.Path) -> None:
    typed = "".join(chr(ord("a") + number % 26) for number in range(3000))
    async with Console(tmp_path / "serial") as shell, Console(tmp_path / "hvc") as hvc:
        disk = empty_disk(tmp_path)
        wanted = options(initrd, disk, f"socket,path={hvc.path}")
        await stable.start("hvc", *wanted, serial=shell.option)
        await shell.wait(READY)
        hvc.write(typed + "\n")
        assert (await shell.run("head -n 1 /dev/hvc0")).strip() == typed


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_it_moves_while_it_writes_to_its_disk(
    stable: Stable, initrd: pathlib.Path, tmp_path: pathlib.Path, postcopy: bool
) -> None:
    machines = Machines(stable, initrd, tmp_path)
    machine = await machines.start()
    await begin(machines)
    for _ in range(2):
        await machines.says_rounds(2)
        machine = await machines.move(machine, postcopy=postcopy)
    await machines.says_rounds(2)
    check(machines)
    await machines.close()


async def test_it_moves_to_stock_and_back(
    stable: Stable, initrd: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    requires("qemu")
    machines = Machines(stable, initrd, tmp_path)
    machine = await machines.start()
    await begin(machines)
    for kind in (StockVM, VM):
        await machines.says_rounds(2)
        machine = await machines.move(machine, kind=kind)
    await machines.says_rounds(2)
    check(machines)
    await machines.close()


async def begin(machines: Machines) -> None:
    """A file system, and the rounds of `write` on it."""
    shell = machines.console
    await shell.wait(READY)
    await shell.run("mke2fs -F /dev/vda >/dev/null && mkdir /mnt && mount -t ext4 /dev/vda /mnt")
    shell.write("write 1000\n")


def check(machines: Machines) -> None:
    """Every round told once, with what the files must hold; the same on the other console."""
    rounds = re.findall(r"^T (\d+) (\w+) (\d+)$", machines.text, re.MULTILINE)
    assert [int(number) for number, _, _ in rounds] == list(range(1, len(rounds) + 1))
    assert {random for _, _, random in rounds} == {"64"}
    assert [sum_ for _, sum_, _ in rounds] == [expected(number) for number in range(1, len(rounds) + 1)]
    told = re.findall(r"^H (\d+)$", machines.said_on_hvc, re.MULTILINE)
    assert [int(number) for number in told[: len(rounds) - 1]] == list(range(1, len(rounds)))


def expected(rounds: int) -> str:
    """The sum of all files after that many rounds."""
    files: dict[int, bytes] = {}
    for i in range(1, rounds + 1):
        files[i % 6] = b"".join(b"%d\n" % number for number in range(i * 9, i * 9 + 20001))
    return hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()


async def test_stocks_sections_are_ours_byte_for_byte(stable: Stable, tmp_path: pathlib.Path) -> None:
    requires("qemu")
    disk = empty_disk(tmp_path)
    wanted = [*DEVICES, "-drive", f"file={disk},format=raw,if=none,id=d0", "-chardev", "null,id=c0"]
    machines = {
        "stock": await stable.start("stock", "-M", STOCK_MACHINE, "-S", *wanted, *DISK_DEVICE, kind=StockVM),
        "ours": await stable.start("ours", "-M", "microvm", "-S", *wanted, *DISK_DEVICE),
    }
    bodies = {}
    for name, machine in machines.items():
        path = tmp_path / name
        await machine.qmp("migrate", uri=f"exec:cat > {path}")
        await machine.wait_migration()
        bodies[name] = virtio_bodies(path.read_bytes())
    assert list(bodies["ours"]) == list(bodies["stock"])
    for idstr, body in bodies["stock"].items():
        ours = bodies["ours"][idstr]
        assert len(ours) == len(body), idstr
        different = [offset for offset in range(len(body)) if ours[offset] != body[offset]]
        assert all(CONFIG_BEGIN <= offset < CONFIG_END for offset in different), (idstr, different)
