"""What the functional migration tests share: guests made for them, and the checks after a migration."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest

from tests.functional.harness import (
    PAGE_BYTES,
    VM,
    Message,
    Pair,
    audit,
    check_dirtier,
    guest_options,
)
from tools import guest_builder

__all__ = [
    "AUDITOR",
    "DIRTIER",
    "DIRTIER_BANDWIDTH",
    "MEMORY_BYTES",
    "MEMORY_KINDS",
    "MIB",
    "SOAK",
    "auditor_lives",
    "check_moved_whole",
    "check_running_auditor",
    "check_running_dirtier",
    "check_was_postcopy",
    "error_of",
    "finish_postcopy",
    "limits",
    "memory_options",
    "needs_root",
    "push_some",
    "stall_in_first_pass",
    "start_postcopy_early",
    "start_postcopy_late",
    "wait_number",
    "wait_passes",
    "wait_status",
]

MIB = 1 << 20
SOAK = os.environ.get("PAGEFERRY_SOAK") == "1"

MEMORY_BYTES = 32 * MIB
DIRTIER_START, DIRTIER_END = 1 * MIB, 17 * MIB
AUDITOR_PAGES = 1024

AUDITOR_BANDWIDTH, DIRTIER_BANDWIDTH = 8 * MIB, 32 * MIB
"""Bytes a second with which a pass over the working set takes half a second."""

HELD = 1
"""Bytes a second at which nothing goes on but what is asked for."""

MEMORY_KINDS = ("anonymous", "memfd-shared", "memfd-private")


def memory_options(kind: str) -> list[str]:
    """The options for one kind of guest RAM, beside `-m`."""
    if kind == "anonymous":
        return []
    share = "on" if kind == "memfd-shared" else "off"
    return ["-object", f"memory-backend-memfd,id=ram0,size={MEMORY_BYTES},share={share}"]


def _machine(kind: str, rung: str | None) -> str:
    backend = "" if kind == "anonymous" else ",memory-backend=ram0"
    return f"microvm{backend}{f',x-dirty-log={rung}' if rung else ''}"


def _options(guest: str, append: str, kind: str, rung: str | None) -> list[str]:
    machine = _machine(kind, rung)
    return [*memory_options(kind), *guest_options(guest, append, memory="32M", machine=machine)]


def DIRTIER(kind: str = "anonymous", rung: str | None = None) -> list[str]:  # noqa: N802 - reads as a constant
    """Options of a 32 MiB machine whose guest writes to every page of 16 MiB without a pause."""
    # After 256 rounds all pages would be pages of zeroes again.
    append = f"start={DIRTIER_START:#x} end={DIRTIER_END:#x} rounds=250"
    return _options("dirtier", append, kind, rung)


def AUDITOR(  # noqa: N802 - reads as a constant
    kind: str = "anonymous", rung: str | None = None, append: str = "beat=16"
) -> list[str]:
    """Options of a 32 MiB machine whose guest checks its 4 MiB of records in every round."""
    return _options("auditor", f"pages={AUDITOR_PAGES} ratio=4 {append}", kind, rung)


# ---- during a migration ----


async def limits(machine: VM, **parameters: int) -> None:
    """Set migration parameters, named with '_' for '-'."""
    await machine.qmp("migrate-set-parameters", **parameters)


async def wait_passes(source: VM, count: int) -> None:
    """Until the bitmap was synced `count` times: the first pass is over with the second one."""
    await source.wait_event("MIGRATION_PASS", lambda event: event["data"]["pass"] >= count)


async def wait_number(source: VM, name: str) -> None:
    """Until the number of this name in query-migrate's `x-postcopy` is no longer 0."""
    async with asyncio.timeout(90):
        while not (shown := await source.qmp("query-migrate")).get("x-postcopy", {}).get(name):
            assert shown["status"] not in ("failed", "completed"), (name, shown)
            await asyncio.sleep(0.002)


async def stall_in_first_pass(
    pair: Pair, bandwidth: int = AUDITOR_BANDWIDTH, *, postcopy: bool = False, **capabilities: bool
) -> None:
    """Migrate, and hold the stream where a part of the working set was sent and then written again.

    However the guest is scheduled: nothing goes on before it has written to each of its pages once more. Nor
    does a postcopy end before its limit is taken off, however long the test takes.
    """
    await limits(pair.source, max_bandwidth=bandwidth, downtime_limit=0, max_postcopy_bandwidth=HELD)
    if postcopy:
        capabilities["postcopy_ram"] = True
    await pair.begin(None, **capabilities)
    async with asyncio.timeout(90):
        while (await pair.source.qmp("query-migrate")).get("ram", {}).get("normal", 0) < 64:
            await asyncio.sleep(0.002)
    await limits(pair.source, max_bandwidth=HELD)
    before = _signs_of_life(pair.source.output())
    await pair.source.wait_output(lambda text: _signs_of_life(text) >= before + 2)


def _signs_of_life(text: str) -> int:
    """How often a dirtier or an auditor has said that it was round its working set a number of times."""
    return text.count("B") + text.count("H")


async def start_postcopy_early(pair: Pair, bandwidth: int = AUDITOR_BANDWIDTH, **capabilities: bool) -> None:
    """Switch to postcopy in the first pass: some pages are out of date, and some were never sent.

    In postcopy nothing is pushed until a test says so: the guest has to ask for those it wants.
    """
    await stall_in_first_pass(pair, bandwidth, postcopy=True, **capabilities)
    await pair.source.qmp("migrate-start-postcopy")
    await wait_status(pair.source, "postcopy-active")


async def start_postcopy_late(pair: Pair, bandwidth: int = AUDITOR_BANDWIDTH) -> None:
    """As `start_postcopy_early`, in the second pass: every page was sent once."""
    await stall_in_first_pass(pair, bandwidth, postcopy=True)
    # All of the working set will be out of date: the second pass is a long one.
    await limits(pair.source, max_bandwidth=bandwidth)
    await wait_passes(pair.source, 2)
    await pair.source.qmp("migrate-start-postcopy")
    await wait_status(pair.source, "postcopy-active")


async def push_some(pair: Pair) -> None:
    """Wait until pages were pushed, and hold the rest again."""
    await limits(pair.source, max_postcopy_bandwidth=2 * MIB)
    await wait_number(pair.source, "pushed-pages")
    await limits(pair.source, max_postcopy_bandwidth=HELD)


async def finish_postcopy(pair: Pair) -> tuple[Message, Message]:
    """Wait until pages were requested, then let the rest come; what query-migrate shows on each side."""
    await wait_number(pair.source, "requested-pages")
    await limits(pair.source, max_postcopy_bandwidth=0)
    return await pair.finish()


async def wait_status(machine: VM, status: str) -> None:
    """Until a MIGRATION event said this."""
    await machine.wait_event("MIGRATION", lambda event: event["data"]["status"] == status)


async def error_of(machine: VM, timeout_s: float = 60.0) -> str:
    """Wait until the migration has failed and return its error-desc."""
    await machine.wait_migration("failed", timeout_s=timeout_s)
    return str((await machine.qmp("query-migrate"))["error-desc"])


# ---- after it ----


async def check_moved_whole(pair: Pair) -> None:
    """Compare both machines page by page; both are stopped, and the destination never ran."""
    assert await pair.source.qmp("query-status") == {
        "running": False,
        "singlestep": False,
        "status": "postmigrate",
    }
    assert (await pair.destination.qmp("query-status"))["status"] == "paused"
    differing = await pair.differing_pages(MEMORY_BYTES)
    assert differing == [], f"{len(differing)} pages differ, the first at {differing[0]:#x}"
    digests = [await machine.qmp("x-query-ram-digest") for machine in (pair.source, pair.destination)]
    assert digests[0] == digests[1]


def _stack_page(guest: str) -> int:
    """The address of the page that a guest of common32.inc has for its stack."""
    symbols = subprocess.run(
        ["nm", str(guest_builder.build(guest))], capture_output=True, text=True, check=True
    ).stdout
    (top,) = (int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" stack_top"))
    return top - PAGE_BYTES


async def _check_outside(pair: Pair, guest: str, start: int, end: int) -> None:
    """All pages but the working set [start, end) and the guest's stack are as they were at the source."""
    differing = set(await pair.differing_pages(start))
    differing.update(await pair.differing_pages(MEMORY_BYTES - end, end))
    assert differing <= {_stack_page(guest)}, [hex(address) for address in sorted(differing)]


async def check_running_dirtier(pair: Pair) -> None:
    """Stop a dirtier that runs at the destination, once it has gone on there, and judge its memory."""
    await pair.destination.wait_output(lambda text: text.count("B") >= 2)
    await pair.destination.qmp("stop")
    check_dirtier(await pair.destination.first_bytes(DIRTIER_START, DIRTIER_END))
    await _check_outside(pair, "dirtier", DIRTIER_START, DIRTIER_END)


async def auditor_lives(machine: VM, *before: str) -> None:
    """Until an auditor has told two more rounds on this machine."""
    told = audit(*before, machine.output()).heartbeats
    await machine.wait_output(lambda text: audit(*before, text).heartbeats >= told + 2)


async def check_running_auditor(pair: Pair) -> None:
    """Stop an auditor that runs at the destination, once it has gone on there, and hear its verdict."""
    await auditor_lives(pair.destination, pair.source.output())
    await pair.destination.qmp("stop")
    verdict = audit(pair.source.output(), pair.destination.output())
    assert verdict.is_good, verdict
    await _check_outside(pair, "auditor", MIB, MIB + AUDITOR_PAGES * PAGE_BYTES)


def check_was_postcopy(shown: Message, *, requested: bool = True, pushed: bool = True) -> None:
    """Fail unless this reply of the source's query-migrate is that of a postcopy in which all was needed."""
    numbers = shown["x-postcopy"]
    assert numbers["discarded-pages"] > 0, "no page was discarded"
    assert numbers["stale-pages"] > 0, "no page that had been sent was out of date"
    assert numbers["resent-pages"] > 0, "no page was sent twice"
    if pushed:
        assert numbers["pushed-pages"] > 0, "no page was pushed"
    if requested:
        assert numbers["requested-pages"] > 0, "no page was requested"
        assert shown["ram"]["postcopy-requests"] > 0, "no request was counted"


def needs_root() -> None:
    """Skip the calling test unless it can start processes of other users."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
