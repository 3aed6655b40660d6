"""vmm/ram.py: blocks, the guest memory map, listeners and guards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from uffd import BitWords, Features, Mode, Userfaultfd
from vmm.ram import MICROVM_HOLE, GuestRam, PageNotReceived, RAMBlock, RamError, RamKind

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(params=RamKind, ids=lambda kind: kind.name.lower())
def block(request: pytest.FixtureRequest) -> Iterator[RAMBlock]:
    made = RAMBlock("ram", MIB, request.param)
    yield made
    made.close()


def new_ram(*lengths: int, hole: tuple[int, int] | None = None) -> GuestRam:
    return GuestRam([RAMBlock(f"block{i}", length) for i, length in enumerate(lengths)], hole)


def map_of(ram: GuestRam) -> list[tuple[int, str, int, int]]:
    return [(r.guest_address, r.block.name, r.offset, r.length) for r in ram.map]


@pytest.mark.parametrize("length", [0, -4096, 100, 65 * GIB])
def test_a_bad_length_is_refused(length: int) -> None:
    with pytest.raises(RamError, match=r"multiple of 4096 up to 64 GiB"):
        RAMBlock("ram", length)


@pytest.mark.parametrize("kind", RamKind)
def test_64_gib_sparse(kind: RamKind) -> None:
    block = RAMBlock("ram", 64 * GIB, kind)
    try:
        block.write(64 * GIB - 4, b"last")
        bits = BitWords(block.page_count)
        assert block.find_populated(bits.address) == 1
        assert bits.word(block.page_count // 64 - 1) == 1 << 63
    finally:
        block.close()


def test_no_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.ram.MAXIMUM_BYTES", 1 << 62)
    with pytest.raises(RamError, match="Cannot allocate"):
        RAMBlock("ram", 1 << 61)


def test_reads_and_writes(block: RAMBlock) -> None:
    assert (block.page_count, block.host_address % 4096) == (256, 0)
    block.write(4000, b"x" * 200)
    block.fill(8192, 4096, 0xAB)
    assert block.read(3999, 202) == b"\0" + b"x" * 200 + b"\0"
    assert block.is_equal(4000, b"x" * 200)
    assert block.is_zero(0, 4000)
    assert not block.is_zero(0, 4001)
    block.discard(0, 2)
    assert block.is_zero(0, 8192)
    assert block.read(8192, 1) == b"\xab"
    block.discard_all()
    assert block.is_zero(0, MIB)


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (MIB, 1), (MIB - 1, 2), (0, MIB + 1), (0, -1)])
def test_outside_of_the_block_is_an_error(block: RAMBlock, offset: int, length: int) -> None:
    for access in (block.read, block.is_zero, lambda o, n: block.fill(o, n, 0)):
        with pytest.raises(RamError, match="not inside of RAMBlock 'ram'"):
            access(offset, length)


def test_pages_outside_of_the_block_are_an_error(block: RAMBlock) -> None:
    with pytest.raises(RamError):
        block.discard(255, 2)


def test_populated_has_pages_that_were_placed_in_a_private_memfd() -> None:
    """They are the mapping's own, so SEEK_DATA does not know them."""
    block, source = RAMBlock("ram", MIB, RamKind.MEMFD_PRIVATE), RAMBlock("source", 4096)
    source.fill(0, 4096, 1)
    userfaultfd = Userfaultfd(Features.MISSING_SHMEM)
    userfaultfd.register(block.host_address, MIB, Mode.MISSING)
    try:
        assert userfaultfd.copy(block.host_address + 4096, source.host_address, 4096) == (4096, 0)
        bits = BitWords(256)
        assert block.find_file_data(bits.address) == 0
        assert block.find_populated(bits.address) == 1
        assert bits.word(0) == 2
    finally:
        userfaultfd.unregister(block.host_address, MIB)
        userfaultfd.close()
        block.close()
        source.close()


def test_an_anonymous_block_has_no_file() -> None:
    block = RAMBlock("ram", MIB)
    with pytest.raises(RamError, match="anonymous"):
        block.find_file_data(BitWords(256).address)
    block.populate_for_reading()
    assert block.find_populated(BitWords(256).address) == 256
    block.close()


def test_huge_pages_are_for_anonymous_memory(block: RAMBlock) -> None:
    block.use_huge_pages(True)
    block.use_huge_pages(False)


@pytest.mark.parametrize(
    ("lengths", "hole", "expected"),
    [
        ((MIB,), None, [(0, "block0", 0, MIB)]),
        ((MIB,), MICROVM_HOLE, [(0, "block0", 0, MIB)]),
        ((3 * GIB,), MICROVM_HOLE, [(0, "block0", 0, 3 * GIB)]),
        ((4 * GIB,), None, [(0, "block0", 0, 4 * GIB)]),
        ((4 * GIB,), MICROVM_HOLE, [(0, "block0", 0, 3 * GIB), (4 * GIB, "block0", 3 * GIB, GIB)]),
        (
            (64 * GIB,),
            MICROVM_HOLE,
            [(0, "block0", 0, 3 * GIB), (4 * GIB, "block0", 3 * GIB, 61 * GIB)],
        ),
        (
            (GIB, 3 * GIB, GIB),
            MICROVM_HOLE,
            [
                (0, "block0", 0, GIB),
                (GIB, "block1", 0, 2 * GIB),
                (4 * GIB, "block1", 2 * GIB, GIB),
                (5 * GIB, "block2", 0, GIB),
            ],
        ),
        (
            (3 * GIB, GIB),
            MICROVM_HOLE,
            [(0, "block0", 0, 3 * GIB), (4 * GIB, "block1", 0, GIB)],
        ),
    ],
)
def test_guest_memory_map(
    lengths: tuple[int, ...], hole: tuple[int, int] | None, expected: list[tuple[int, str, int, int]]
) -> None:
    ram = new_ram(*lengths, hole=hole)
    assert map_of(ram) == expected
    assert ram.length_bytes == sum(lengths)
    assert ram.map[-1].host_address == ram.map[-1].block.host_address + ram.map[-1].offset
    ram.close()


def test_guest_addresses_around_the_hole() -> None:
    ram = new_ram(4 * GIB, hole=MICROVM_HOLE)
    block = ram.blocks[0]
    ram.write(3 * GIB - 2, b"ab")
    ram.write(4 * GIB, b"cd")
    assert block.read(3 * GIB - 2, 4) == b"abcd"
    assert ram.read(4 * GIB, 2) == b"cd"
    assert list(ram.guest_ranges(block, 3 * GIB - 2, 4)) == [(3 * GIB - 2, 2), (4 * GIB, 2)]
    for address, length in [(3 * GIB - 2, 3), (3 * GIB, 1), (5 * GIB - 1, 2), (-1, 1), (0, -1)]:
        with pytest.raises(RamError, match="not all RAM"):
            ram.read(address, length)
    with pytest.raises(RamError):
        ram.write(3 * GIB - 2, b"xyz")
    assert block.read(3 * GIB - 2, 2) == b"ab"  # nothing was written
    ram.close()


def test_an_access_across_two_blocks() -> None:
    ram = new_ram(MIB, MIB)
    ram.write(MIB - 2, b"abcd")
    assert ram.read(MIB - 2, 4) == b"abcd"
    assert ram.blocks[1].read(0, 2) == b"cd"
    ram.close()


def test_two_blocks_have_two_names() -> None:
    ram = new_ram(MIB, MIB)
    with pytest.raises(RamError, match="Two RAMBlocks are called 'block0'"):
        GuestRam([ram.blocks[0], ram.blocks[0]])
    ram.close()


def test_listeners_hear_of_all_but_guest_stores() -> None:
    ram = new_ram(MIB, MIB)
    heard: list[tuple[str, int, int, bytes]] = []

    def listener(block: RAMBlock, offset: int, length: int) -> None:
        heard.append((block.name, offset, length, block.read(offset, min(length, 2))))

    ram.add_write_listener(listener)
    ram.write(MIB - 1, b"ab")
    ram.blocks[0].fill(10, 5, 1)
    ram.blocks[0].fill(10, 0, 1)
    ram.blocks[0].write(10, b"")
    ram.blocks[1].discard(3, 2)
    ram.blocks[1].discard(3, 0)
    ram.blocks[1].notify_written(4096, 4096)
    assert heard == [
        ("block0", MIB - 1, 1, b"a"),  # told after the bytes are there
        ("block1", 0, 1, b"b"),
        ("block0", 10, 5, b"\1\1"),
        ("block1", 3 * 4096, 8192, b"\0\0"),
        ("block1", 4096, 4096, b"\0\0"),
    ]
    ram.remove_write_listener(listener)
    ram.write(0, b"x")
    assert len(heard) == 5
    ram.close()


class ReceivedMap:
    """Pages that have arrived."""

    def __init__(self, *pages: int) -> None:
        self.pages = set(pages)

    def has_all(self, _block: RAMBlock, first_page: int, page_count: int) -> bool:
        return self.pages >= set(range(first_page, first_page + page_count))


def test_a_page_that_was_not_received_is_an_error_for_users() -> None:
    ram = new_ram(MIB)
    block = ram.blocks[0]
    ram.set_read_guard(ReceivedMap(0, 1, 3).has_all)
    block.write(0, b"fine")
    assert ram.read(0, 8192) == b"fine" + bytes(8188)
    for access in (
        lambda: ram.read(8191, 2),
        lambda: ram.write(8191, b"xy"),
        lambda: block.fill(8191, 2, 0),
        lambda: block.is_zero(4096, 4097),
        lambda: block.is_equal(8191, b"xy"),
    ):
        with pytest.raises(PageNotReceived) as caught:
            access()
        assert caught.value.block == "block0"
        assert caught.value.first_page + caught.value.page_count > 2
    assert block.read(8191, 0) == b""
    assert block.read(8191, 2, may_wait=True) == b"\0\0"
    ram.set_read_guard(None)
    assert block.read(8191, 2) == b"\0\0"
    ram.close()
