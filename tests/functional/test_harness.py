"""The harness on stock QEMU: it migrates a pair, leaves nothing behind, and says what a dead process said."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from qemu.qmp import Runstate

from tests.functional.harness import NOBODY, VM, Stable, StockVM, VmError, audit, guest_options
from tests.support.requires import requires

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def _stock() -> None:
    requires("qemu")


@pytest.mark.parametrize("postcopy", [False, True])
async def test_a_pair_migrates(stable: Stable, postcopy: bool) -> None:
    if postcopy:
        requires("uffd")
    pair = await stable.pair(*guest_options("auditor", "pages=64 beat=1000"), kind=StockVM)
    await pair.source.wait_output(lambda text: "H" in text)
    shown, _ = await (pair.postcopy() if postcopy else pair.precopy())
    assert shown["status"] == "completed"
    await pair.destination.wait_output(lambda text: "H" in text)
    assert audit(pair.source.output(), pair.destination.output()).heartbeats > 1


async def test_a_bad_option_is_told_with_the_process_own_words(stable: Stable) -> None:
    with pytest.raises(VmError, match=r"exited with 1:\nqemu.*unsupported machine"):
        await stable.start("bad", "-M", "no-such-machine", kind=StockVM)


async def test_close_leaves_no_process_and_no_folder() -> None:
    vm = StockVM("closing", *guest_options("hello"))
    await vm.start()
    pid = vm.pid
    await vm.close()
    assert not vm.folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_close_that_is_cancelled_still_hangs_up() -> None:
    """As by a Ctrl-C just then: a client with half a connection complains when it is collected."""
    vm = StockVM("cancelled", *guest_options("hello"))
    await vm.start()
    assert vm.process is not None
    vm.process.kill()
    vm.process.wait()
    closing = asyncio.create_task(vm.close())
    await asyncio.sleep(0)  # it waits for the connection's end now
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert vm.client.runstate is Runstate.IDLE
    assert not vm.folder.exists()


async def test_a_terminals_ctrl_c_is_not_for_the_machines(stable: Stable) -> None:
    vm = await stable.start("apart", *guest_options("hello"), kind=StockVM)
    assert os.getpgid(vm.pid) != os.getpgrp()


async def test_a_process_that_dies_is_noticed(stable: Stable) -> None:
    vm = await stable.start("dying", *guest_options("dirtier", memory="128M"), kind=StockVM)
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(VmError, match=r"exited with -9|gone during"):
        await vm.wait_output(lambda text: "never" in text)


async def test_an_unprivileged_process_is_one(stable: Stable) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    vm: VM = await stable.start("nobody", *guest_options("hello"), kind=StockVM, user=NOBODY)
    status = f"/proc/{vm.pid}/status"
    with open(status) as lines:
        assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}\n" in lines.readlines()
