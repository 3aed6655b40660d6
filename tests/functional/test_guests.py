"""The guests themselves: they boot, they notice damage, and they stay right while nothing is done to them.

On stock QEMU too, so that a complaint of theirs under Pageferry is Pageferry's.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.functional.harness import VM, Stable, StockVM, VmError, audit, check_dirtier, guest_options
from tests.support.requires import requires
from tools.guest_checks import DIRTIER_END, DIRTIER_START

pytestmark = pytest.mark.asyncio

EXIT_PORT = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
KINDS = pytest.mark.parametrize("kind", [VM, StockVM], ids=["pageferry", "stock"])


def need(kind: type[VM]) -> None:
    """Skip if a machine of this kind cannot be had."""
    if kind is StockVM:
        requires("qemu")


async def run_to_the_end(vm: VM) -> int:
    """Start a guest that leaves by itself, maybe before the answer to `cont`; returns the exit status."""
    with contextlib.suppress(VmError):
        await vm.qmp("cont")
    return await vm.wait_exit()


@KINDS
@pytest.mark.parametrize("code", [0, 5])
async def test_hello_says_so_and_leaves(stable: Stable, kind: type[VM], code: int) -> None:
    need(kind)
    vm = await stable.start("hello", *guest_options("hello", f"code={code}"), *EXIT_PORT, "-S", kind=kind)
    assert await run_to_the_end(vm) == 2 * code + 1
    assert vm.output() == "Hello from the guest\n"


@KINDS
async def test_auditor_sees_each_kind_of_damage(stable: Stable, kind: type[VM]) -> None:
    need(kind)
    vm = await stable.start(
        "auditor", *guest_options("auditor", "selftest=5 beat=7"), *EXIT_PORT, "-S", kind=kind
    )
    assert await run_to_the_end(vm) == 2 * 3 + 1
    assert vm.output().splitlines() == [
        "LOST 00101000 expected 00101000 got 00000000",
        "STALE 00102000 expected 00000001 got 00000000",
        "TORN 00103000 expected 9e274eb1 got 9e274eb0",
        "H 00000007",
        "E 00000003",
    ]


@KINDS
async def test_auditor_is_content_when_left_alone(stable: Stable, kind: type[VM]) -> None:
    need(kind)
    vm = await stable.start("auditor", *guest_options("auditor", "pages=64 beat=100"), kind=kind)
    await vm.wait_output(lambda text: text.count("H") >= 5)
    await vm.qmp("stop")
    verdict = audit(vm.output())
    assert verdict.is_good, verdict


@KINDS
@pytest.mark.parametrize("guest", ["dirtier", "dirtier_boot"])
async def test_dirtier_keeps_its_rule(stable: Stable, kind: type[VM], guest: str) -> None:
    need(kind)
    machine = "pc" if kind is StockVM else "microvm"
    vm = await stable.start("dirtier", *guest_options(guest, memory="128M", machine=machine), kind=kind)
    await vm.wait_output(lambda text: "AB" in text)
    await vm.qmp("stop")
    check_dirtier(await vm.first_bytes(DIRTIER_START, DIRTIER_END))


def longmode(kind: type[VM], append: str) -> list[str]:
    """Options for the long mode guest: stock loads no ELF64."""
    if kind is StockVM:
        return guest_options("longmode_multiboot", append, machine="pc")
    return guest_options("longmode", append)


@KINDS
async def test_longmode_is_content_when_left_alone(stable: Stable, kind: type[VM]) -> None:
    need(kind)
    vm = await stable.start("longmode", *longmode(kind, "pages=32 beat=100"), kind=kind)
    await vm.wait_output(lambda text: text.count("L") >= 5)
    await vm.qmp("stop")
    verdict = audit(vm.output())
    assert verdict.is_good, verdict


@KINDS
@pytest.mark.parametrize(
    ("vector", "error", "address"), [(6, 0, 0), (13, 0xFFF8, 0), (14, 0, 0xFFFF900000001230)]
)
async def test_longmode_handles_its_exceptions(
    stable: Stable, kind: type[VM], vector: int, error: int, address: int
) -> None:
    need(kind)
    options = longmode(kind, f"pages=1 beat=1 fault={vector}")
    vm = await stable.start("longmode", *options, *EXIT_PORT, "-S", kind=kind)
    assert await run_to_the_end(vm) == 2 * vector + 1
    last = vm.output().splitlines()[-1]
    assert last.startswith(f"X {vector:016x} error {error:016x} at ffff8000018")
    assert last.endswith(f"address {address:016x}")
