"""What the demo writes, in a terminal and in a file."""

from __future__ import annotations

import io

import pytest

from tools.demo_screen import Progress, RateMeter, Screen, figure, first_difference, page_map, table


@pytest.mark.parametrize(
    ("fractions", "drawn"),
    [([], ""), ([0.0, 1.0], " █"), ([0.001], "▁"), ([0.5, 0.999, 1.5], "▄▇█")],
)
def test_page_map(fractions: list[float], drawn: str) -> None:
    assert page_map(fractions) == drawn


@pytest.mark.parametrize(
    ("path", "unit", "text"),
    [
        (("total-time",), "ms", "1,234 ms"),
        (("ram", "mbps"), "", "99.5"),
        (("ram", "none"), "ms", "-"),
        (("absent", "deep"), "", "-"),
        (("total-time", "deep"), "", "-"),
        (("status",), "", "-"),
    ],
)
def test_figure(path: tuple[str, ...], unit: str, text: str) -> None:
    reply = {"status": "completed", "total-time": 1234, "ram": {"mbps": 99.5}}
    assert figure(reply, *path, unit=unit) == text


def test_figure_in_another_unit() -> None:
    assert figure({"median": 14_500}, "median", unit="us", per=1000) == "14.5 us"


def test_table() -> None:
    assert table(["", "a"], [["long name", "1"], ["x", "1,000"]]) == [
        "               a",
        "---------  -----",
        "long name      1",
        "x          1,000",
    ]


def progress(status: str, remaining: int = 25) -> Progress:
    ram = {"total": 100, "remaining": remaining, "normal": 3, "duplicate": 4, "dirty-sync-count": 2}
    return Progress(status, 1.5, 10.0, {"status": status, "ram": ram}, {})


@pytest.mark.parametrize(
    ("shown", "fractions"),
    [
        (Progress("active", 0, 0, {}, {"x-page-map": [0, 1]}), [0.0, 1.0]),
        (progress("active"), [1.0] * 48 + [0.0] * 16),
        (progress("completed", remaining=100), [1.0] * 64),
        (Progress("setup", 0, 0, {}, {}), [0.0] * 64),
    ],
)
def test_map_falls_back_to_a_bar(shown: Progress, fractions: list[float]) -> None:
    assert shown.map_fractions() == fractions


def test_a_terminal_is_drawn_over() -> None:
    stream = io.StringIO()
    screen = Screen(stream, live=True)
    screen.show(progress("active"))
    screen.show(progress("active"))
    screen.say("kept")
    screen.show(progress("active"))
    assert stream.getvalue().count("\x1b[2A") == 1
    assert "7 pages" in stream.getvalue()


def test_a_file_gets_plain_lines_and_each_phase() -> None:
    stream = io.StringIO()
    screen = Screen(stream, live=False)
    for status in ("active", "active", "active", "completed"):
        screen.show(progress(status))
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["active", "completed"]
    assert "\x1b" not in stream.getvalue()


def test_rate() -> None:
    meter = RateMeter()
    assert meter.read(1.0, 0) == 0.0
    assert meter.read(2.0, 5_000_000) == 5.0


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (b"aaaabbbb", b"aaaabbbb", (0, None)),
        (b"aaaabbbb", b"aaaabbxb", (1, 6)),
        (b"aaaabbbb", b"axaabbxb", (2, 1)),
        (b"aaaabbbb", b"aaaa", (1, 4)),
    ],
)
def test_first_difference(one: bytes, other: bytes, found: tuple[int, int | None]) -> None:
    assert first_difference(one, other, 4) == found
