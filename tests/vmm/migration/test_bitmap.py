"""`Bitmap` (C) against a set of numbers."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmm.migration.bitmap import Bitmap

PAGES = 200  # not a multiple of 64: the last word is partly used

ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda r: (min(r), abs(r[1] - r[0])))
sets = st.sets(st.integers(0, PAGES - 1))


def bitmap_of(pages: set[int]) -> Bitmap:
    bitmap = Bitmap(PAGES)
    for page in pages:
        bitmap.set(page)
    return bitmap


class AgainstASet(RuleBasedStateMachine):
    """Every operation on both."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmap = Bitmap(PAGES)
        self.model: set[int] = set()

    @rule(where=ranges)
    def set_range(self, where: tuple[int, int]) -> None:
        self.bitmap.set_range(*where)
        self.model |= set(range(where[0], sum(where)))

    @rule(where=ranges)
    def clear_range(self, where: tuple[int, int]) -> None:
        self.bitmap.clear_range(*where)
        self.model -= set(range(where[0], sum(where)))

    @rule(other=sets, name=st.sampled_from(["or_", "and_", "andnot", "ornot"]))
    def combine(self, other: set[int], name: str) -> None:
        getattr(self.bitmap, name)(bitmap_of(other))
        everything = set(range(PAGES))
        self.model = {
            "or_": self.model | other,
            "and_": self.model & other,
            "andnot": self.model - other,
            "ornot": self.model | (everything - other),
        }[name]

    @rule(other=sets, third=sets)
    def pour(self, other: set[int], third: set[int]) -> None:
        into, also = bitmap_of(other), bitmap_of(third)
        self.bitmap.pour(into, also)
        assert into == bitmap_of(other | self.model)
        assert also == bitmap_of(third | self.model)
        self.model = set()

    @rule(value=st.booleans())
    def fill(self, value: bool) -> None:
        self.bitmap.fill(value)
        self.model = set(range(PAGES)) if value else set()

    @rule(start=st.integers(0, PAGES + 5))
    def find(self, start: int) -> None:
        later = range(start, PAGES)
        assert self.bitmap.find_next_set(start) == next((p for p in later if p in self.model), None)
        assert self.bitmap.find_next_clear(start) == next((p for p in later if p not in self.model), None)

    @rule(step=st.integers(1, PAGES + 10))
    def count_stretches(self, step: int) -> None:
        stretches = [range(first, min(first + step, PAGES)) for first in range(0, PAGES, step)]
        assert self.bitmap.count_stretches(step) == [len(self.model & set(each)) for each in stretches]

    @invariant()
    def same(self) -> None:
        assert self.bitmap.count() == len(self.model)
        assert {p for first, count in self.bitmap.runs() for p in range(first, first + count)} == self.model
        data = self.bitmap.to_bytes()
        assert int.from_bytes(data, "little") == sum(1 << page for page in self.model)
        assert Bitmap.from_bytes(PAGES, data) == self.bitmap == self.bitmap.copy()


TestAgainstASet = AgainstASet.TestCase


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("set", (PAGES,)),
        ("clear", (-1,)),
        ("test", (PAGES,)),
        ("set_range", (PAGES - 1, 2)),
        ("clear_range", (0, PAGES + 1)),
        ("find_next_set", (-1,)),
    ],
)
def test_a_page_outside_is_an_error(method: str, arguments: tuple[int, ...]) -> None:
    with pytest.raises(IndexError, match="outside a bitmap of 200"):
        getattr(Bitmap(PAGES), method)(*arguments)


def test_bad_bytes_and_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        Bitmap(1).count_stretches(0)
    with pytest.raises(ValueError, match="at least one page"):
        Bitmap(0)
    with pytest.raises(ValueError, match="has 32 bytes, not 31"):
        Bitmap.from_bytes(PAGES, bytes(31))
    with pytest.raises(ValueError, match="beyond page 199"):
        Bitmap.from_bytes(PAGES, bytes(31) + b"\x80")
    with pytest.raises(ValueError, match="cannot be combined"):
        Bitmap(64).or_(Bitmap(65))
