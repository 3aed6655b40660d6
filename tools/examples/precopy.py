"""Move a running guest to another process by precopy, with nothing but the public `qemu.qmp` package.

    pageferry -kernel guest.elf -qmp unix:/tmp/a,server=on,wait=off ... &
    pageferry -kernel guest.elf -qmp unix:/tmp/b,server=on,wait=off ... -incoming defer &
    python precopy.py /tmp/a /tmp/b unix:/tmp/wire

Works with QEMU in place of either.
"""

import asyncio
import sys
from typing import Any

from qemu.qmp import EventListener, QMPClient


async def main(source_path: str, destination_path: str, uri: str) -> None:
    """Move the guest from one VM to the other."""
    source, destination = QMPClient("source"), QMPClient("destination")
    await source.connect(source_path)
    await destination.connect(destination_path)
    try:
        for vm in (source, destination):
            events = {"capability": "events", "state": True}
            await vm.execute("migrate-set-capabilities", {"capabilities": [events]})
        await source.execute("migrate-set-parameters", {"downtime-limit": 200})
        await destination.execute("migrate-incoming", {"uri": uri})
        with source.listener("MIGRATION") as source_events, destination.listener("RESUME") as resumed:
            await source.execute("migrate", {"uri": uri})
            await completed(source_events)
            await resumed.get()
        result: Any = await source.execute("query-migrate")
        print(f"completed in {result['total-time']} ms, the guest stood still for {result['downtime']} ms,")
        print(f"{result['ram']['transferred']} bytes in {result['ram']['dirty-sync-count']} passes")
    finally:
        await source.disconnect()
        await destination.disconnect()


async def completed(events: EventListener) -> None:
    """Wait for the end of the migration; print what comes before it."""
    async for event in events:
        data: Any = event["data"]
        print(data["status"])
        if data["status"] in ("failed", "cancelled"):
            raise SystemExit("the guest has stayed where it was")
        if data["status"] == "completed":
            return


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: precopy.py SOURCE-QMP DESTINATION-QMP URI")
    asyncio.run(main(*sys.argv[1:]))
