"""An example of a test with the fixtures beside it: a running guest moves, and goes on where it stopped.

GUEST=build/guests/dirtier.elf python -m pytest tools/examples
"""

import asyncio
import os
from typing import Any

import pytest

OPTIONS = ("-m", "64", "-kernel", os.environ.get("GUEST", "guest.elf"), "-append", "end=0x1100000")


async def until(condition: Any) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_the_guest_moves(start_vm: Any, postcopy: bool) -> None:
    """It prints on at the target."""
    source = await start_vm(*OPTIONS)
    target = await start_vm(*OPTIONS, "-incoming", "defer")
    await until(lambda: "A" in source.console)
    wanted = [{"capability": "events", "state": True}, {"capability": "postcopy-ram", "state": postcopy}]
    for vm in (source, target):
        await vm.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
    uri = f"unix:{target.folder / 'migration'}"
    await target.qmp.execute("migrate-incoming", {"uri": uri})
    with source.qmp.listener("MIGRATION") as events, target.qmp.listener("MIGRATION") as arrived:
        await source.qmp.execute("migrate", {"uri": uri})
        while (await events.get())["data"]["status"] != "active":
            pass
        if postcopy:
            await source.qmp.execute("migrate-start-postcopy")
        while (await arrived.get())["data"]["status"] != "completed":
            pass
    assert (await target.qmp.execute("query-status"))["status"] == "running"
    written = len(target.console)
    await until(lambda: len(target.console) > written)
