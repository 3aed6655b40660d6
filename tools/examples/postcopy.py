"""Move a running guest by postcopy, and go on with it when the connection breaks in the middle.

    python postcopy.py /tmp/a /tmp/b unix:/tmp/wire

As `precopy.py`, but the guest runs at the destination while most of its memory is still at the source. If
the connection is lost then, both sides stand in `postcopy-paused` with the guest's memory in two halves:
nothing is lost as long as both processes live. The destination is told to listen anew (`migrate-recover`,
out of band since a paused guest may hold up other commands) and the source to connect (`migrate` with
`resume`). Works with QEMU in place of either.
"""

import asyncio
import itertools
import sys
from typing import Any

from qemu.qmp import EventListener, QMPClient


async def main(source_path: str, destination_path: str, uri: str) -> None:
    """Move the guest, as often as the connection breaks."""
    source, destination = QMPClient("source"), QMPClient("destination")
    await source.connect(source_path)
    await destination.connect(destination_path)
    try:
        for vm in (source, destination):
            wanted = [{"capability": name, "state": True} for name in ("events", "postcopy-ram")]
            await vm.execute("migrate-set-capabilities", {"capabilities": wanted})
        await destination.execute("migrate-incoming", {"uri": uri})
        with source.listener("MIGRATION") as here, destination.listener("MIGRATION") as there:
            await source.execute("migrate", {"uri": uri})
            await status(here, "active")
            await source.execute("migrate-start-postcopy")
            for attempt in itertools.count(1):
                if await status(here, "completed", "postcopy-paused") == "completed":
                    break
                await status(there, "postcopy-paused")
                again = f"{uri}-{attempt}"
                print(f"the connection broke: going on over {again}")
                await destination.execute("migrate-recover", {"uri": again}, oob=True)
                await source.execute("migrate", {"uri": again, "resume": True})
            await status(there, "completed")
        result: Any = await source.execute("query-migrate")
        print(f"completed in {result['total-time']} ms, {result['ram']['postcopy-requests']} pages asked for")
    finally:
        await source.disconnect()
        await destination.disconnect()


async def status(events: EventListener, *wanted: str) -> str:
    """Wait for one of these states; print those before it."""
    async for event in events:
        data: Any = event["data"]
        print(now := data["status"])
        if now in ("failed", "cancelled"):
            raise SystemExit("the guest has stayed where it was")
        if now in wanted:
            break
    return str(now)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: postcopy.py SOURCE-QMP DESTINATION-QMP URI")
    asyncio.run(main(*sys.argv[1:]))
