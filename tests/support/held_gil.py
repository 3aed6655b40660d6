"""A destination in a process of its own, in which Python does its worst while pages come.

    python -m tests.support.held_gil URI GUEST APPEND MEMORY WAY ADDRESS

It takes one postcopy migration and, once the guest may run, reads the page at guest address ADDRESS, which
must still be missing, in one of two ways:

    threads   by `ram.read(may_wait=True)` in one thread, while eight others compute without a pause
    held      through a plain pointer, so that the reader holds the GIL until the page is there: whatever
              needs the GIL on the way of a page would wait for ever

It prints the SHA-256 of the page, waits for the end of the migration, and prints the guest's output.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import threading

from tests.support.real_machines import PAGE, Side

__all__ = ["main"]


def _spin(stop: threading.Event) -> None:
    count = 0
    while not stop.is_set():
        count += 1


def _read_among_threads(side: Side, address: int) -> bytes:
    stop = threading.Event()
    spinners = [threading.Thread(target=_spin, args=(stop,)) for _ in range(8)]
    for spinner in spinners:
        spinner.start()
    pages: list[bytes] = []
    reader = threading.Thread(
        target=lambda: pages.append(side.machine.ram.read(address, PAGE, may_wait=True))
    )
    reader.start()
    reader.join()
    stop.set()
    for spinner in spinners:
        spinner.join()
    return pages[0]


def _read_holding_the_gil(side: Side, address: int) -> bytes:
    return ctypes.string_at(side.machine.ram.map[0].host_address + address, PAGE)


def main() -> None:
    """The script."""
    uri, guest, append, memory, way, address = sys.argv[1:]
    side = Side(guest, append, memory=int(memory), incoming=True)
    side.capability("postcopy-ram")
    side.migrator.incoming(uri)
    print("listening", flush=True)
    side.wait_event("POSTCOPY_STATE", "running")
    was_missing = not side.received.test(int(address) // PAGE)
    read = {"threads": _read_among_threads, "held": _read_holding_the_gil}[way]
    page = read(side, int(address))
    print("missing" if was_missing else "there", hashlib.sha256(page).hexdigest(), flush=True)
    side.wait("completed")
    side.wait_heartbeat(2)
    side.pause()
    print(json.dumps(side.serial.text), flush=True)
    side.close()


if __name__ == "__main__":
    sys.setswitchinterval(0.0002)
    main()
