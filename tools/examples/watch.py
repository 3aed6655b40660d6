"""Print every event of a VM as it comes, until the VM ends.

    python watch.py /tmp/a

A monitor serves one client at a time, so give the VM one for watching,
`-qmp unix:/tmp/watch,server=on,wait=off`, or one that serves many, `x-exclusive=off`. Works with QEMU.
"""

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

from qemu.qmp import EventListener, QMPClient


async def main(path: str) -> None:
    """Print until the VM hangs up."""
    vm = QMPClient("watched")
    events = EventListener()
    vm.register_listener(events)
    await vm.connect(path)
    status: Any = await vm.execute("query-status")
    print(status["status"], flush=True)
    hang_up = asyncio.ensure_future(vm.runstate_changed())
    while True:
        next_event = asyncio.ensure_future(events.get())
        await asyncio.wait({next_event, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        if not next_event.done():
            next_event.cancel()
            break
        event: Any = next_event.result()
        stamp = event["timestamp"]
        clock = time.strftime("%H:%M:%S", time.localtime(stamp["seconds"]))
        data = json.dumps(event.get("data", {}))
        print(f"{clock}.{stamp['microseconds'] // 1000:03} {event['event']} {data}", flush=True)
    with contextlib.suppress(EOFError):  # the VM hung up first: that is its end
        await vm.disconnect()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: watch.py QMP")
    asyncio.run(main(sys.argv[1]))
