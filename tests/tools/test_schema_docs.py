"""The reference says what the schema says, and its links lead somewhere."""

from __future__ import annotations

import re

import pytest

from tools.schema_docs import TARGET, anchor, main


def test_the_reference_in_the_tree_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, f"run python -m tools.schema_docs:\n{capsys.readouterr().out}"


def test_links() -> None:
    text = TARGET.read_text()
    targets = {anchor(heading) for heading in re.findall(r"^##+ (.*)$", text, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert len(links) > 20
    assert links <= targets
