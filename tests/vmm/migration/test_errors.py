"""The error tree: whose fault, and the attributes that programs read."""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

import vmm.errors
from vmm.migration import errors


def test_the_drawing_at_the_top_is_the_tree() -> None:
    drawing = errors.__doc__ or ""
    for name in errors.__all__:
        if not inspect.isclass(getattr(errors, name)):
            continue
        assert issubclass(getattr(errors, name), vmm.errors.PageferryError)
        assert re.search(rf"\+- {name}\b", drawing)
    parents: list[tuple[int, type]] = [(-1, vmm.errors.PageferryError)]
    for line in drawing.splitlines():
        if "+- " not in line:
            continue
        depth, name = line.index("+- "), line.split("+- ")[1].split()[0]
        while parents[-1][0] >= depth:
            parents.pop()
        kind = getattr(errors, name)
        assert kind.__bases__ == (parents[-1][1],), name
        parents.append((depth, kind))


def test_all_is_complete() -> None:
    own = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert own <= set(errors.__all__)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.WireError("magic", offset=4, expected=3, got=2), "magic: expected 3, got 2 (at offset 4)"),
        (errors.WireError("magic", got=2), "magic: 2"),
        (errors.WireError("magic"), "magic"),
        (
            errors.RecordTruncated("PING value", 4, 1, offset=9),
            "Unexpected end of stream: 4 bytes wanted, 1 left (at offset 9), in PING value",
        ),
        (
            errors.IllegalStatusMove("source", "none", "active"),
            "Illegal migration status move at the source: 'none' -> 'active'",
        ),
        (errors.PeerReported(1), "Sibling indicated error 1"),
        (
            errors.LostPages({"ram": 2, "rom": 0}),
            "The migration ended but pages are missing: 2 of RAMBlock 'ram'",
        ),
        (errors.Cancelled(), "The migration was cancelled"),
        (errors.ParameterRefused("downtime-limit", "no"), "no"),
    ],
)
def test_texts(error: Exception, text: str) -> None:
    assert str(error) == text


def test_nobody_reads_the_text_of_an_error() -> None:
    for path in pathlib.Path(errors.__file__).parent.glob("*.py"):
        assert "error.args" not in path.read_text(), path


def test_the_reason_for_a_user_has_no_errno() -> None:
    assert errors.reason(ConnectionRefusedError(111, "Connection refused")) == "Connection refused"
    assert errors.reason(errors.Cancelled()) == "The migration was cancelled"
