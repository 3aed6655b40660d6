"""The typed client says what the schema says."""

from __future__ import annotations

import pytest

from tools.client_generator import main


@pytest.mark.slow
def test_the_client_in_the_tree_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, f"run python -m tools.client_generator:\n{capsys.readouterr().out}"
