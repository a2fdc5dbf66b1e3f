"""Every test that runs a verb does so in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a verb, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return Command(capsys)
