"""Reading guest RAM over QMP: what is saved, what is refused, and that nobody waits for a missing page."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import pytest

from qmp.fdsets import FdSets
from tests.vmm.control.fakes import FakeMachine
from vmm.control.memory import handlers
from vmm.errors import MachineError
from vmm.ram import GuestRam, PageNotReceived, RAMBlock, RamError

PAGE = 4096


class FakeCall:
    """The part of a Call that these handlers read."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


@pytest.fixture
def ram() -> GuestRam:
    blocks = [RAMBlock("a", 300 * PAGE), RAMBlock("b", 8 * PAGE)]
    blocks[0].write(0, b"first")
    blocks[0].write(299 * PAGE, b"last")
    return GuestRam(blocks)


async def run(ram: GuestRam, command: str, **arguments: Any) -> Any:
    machine = FakeMachine()
    machine.ram.close()
    machine.ram = ram
    result: Any = handlers(machine, FdSets())[command](FakeCall(**arguments))  # type: ignore[arg-type]  # enough of a Call
    return await result


@pytest.mark.asyncio
async def test_pmemsave(ram: GuestRam, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ram"
    await run(ram, "pmemsave", val=0, size=308 * PAGE, filename=str(path))
    data = path.read_bytes()
    assert len(data) == 308 * PAGE
    assert data.startswith(b"first")
    assert data[299 * PAGE :].startswith(b"last")
    with pytest.raises(RamError, match="are not all RAM"):
        await run(ram, "pmemsave", val=0, size=309 * PAGE, filename=str(path))
    with pytest.raises(MachineError, match="Could not open '/nowhere/x': No such file"):
        await run(ram, "pmemsave", val=0, size=1, filename="/nowhere/x")
    with pytest.raises(MachineError, match="Could not write to '/dev/full': No space left"):
        await run(ram, "pmemsave", val=0, size=PAGE, filename="/dev/full")


@pytest.mark.asyncio
async def test_memsave_goes_by_the_page_tables(ram: GuestRam, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ram"
    await run(ram, "memsave", val=0x1000, size=5, filename=str(path))
    assert path.read_bytes() == b"first"
    with pytest.raises(MachineError, match="Invalid addr 0x0000000000000010/size 5 specified"):
        await run(ram, "memsave", val=0x10, size=5, filename=str(path))
    with pytest.raises(MachineError, match="Parameter 'cpu-index' expects a CPU number"):
        await run(ram, "memsave", **{"val": 0, "size": 5, "filename": str(path), "cpu-index": 1})


@pytest.mark.asyncio
async def test_a_digest_sees_every_byte_and_its_place(ram: GuestRam) -> None:
    expected = hashlib.sha256()
    for page, text in ((0, b"first"), (299, b"last")):
        expected.update(page.to_bytes(8, "big") + text.ljust(PAGE, b"\0"))
    empty = hashlib.sha256().hexdigest()
    before = await run(ram, "x-query-ram-digest")
    assert before == [{"name": "a", "sha256": expected.hexdigest()}, {"name": "b", "sha256": empty}]
    ram.blocks[1].write(5 * PAGE + 7, b"\1")
    moved = await run(ram, "x-query-ram-digest")
    assert moved[0] == before[0]
    ram.blocks[1].write(5 * PAGE + 7, b"\0")
    ram.blocks[1].write(4 * PAGE + 7, b"\1")
    assert (await run(ram, "x-query-ram-digest"))[1] != moved[1] != before[1]


@pytest.mark.asyncio
async def test_a_page_that_is_not_here_is_an_error(ram: GuestRam, tmp_path: pathlib.Path) -> None:
    ram.set_read_guard(lambda block, first, count: not (block.name == "a" and first <= 290 < first + count))
    with pytest.raises(PageNotReceived):
        await run(ram, "pmemsave", val=0, size=300 * PAGE, filename=str(tmp_path / "ram"))
    with pytest.raises(PageNotReceived):
        await run(ram, "x-query-ram-digest")
    await run(ram, "pmemsave", val=0, size=PAGE, filename=str(tmp_path / "ram"))
