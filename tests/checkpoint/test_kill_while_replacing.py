"""A process that replaces a folder and a file over and over is killed at any moment: each is whole, always."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steelyard.atomic import sweep

REPLACE = """
import sys
from pathlib import Path
from steelyard.atomic import folder_aside, write_file
folder = Path(sys.argv[1])
print("begun", flush=True)
for round in range(1, 1_000_000):
    with folder_aside(folder / "model") as aside:
        (aside / "a.txt").write_text(str(round))
        (aside / "b.txt").write_text(str(round))
    write_file(folder / "file.txt", str(round) * 1000)
"""


def rounds(folder: Path) -> tuple[int, int]:
    """The round that the folder and the file are of; fails where one is mixed, partial or missing."""
    a, b = ((folder / "model" / name).read_text() for name in ("a.txt", "b.txt"))
    assert a == b
    file = (folder / "file.txt").read_text()
    assert file == file[: len(file) // 1000] * 1000
    return int(a), int(file[: len(file) // 1000])


@pytest.mark.parametrize("seed", range(4))
def test_whole_after_a_kill(tmp_path: Path, seed: int) -> None:
    (tmp_path / "model").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "model" / name).write_text("0")
    (tmp_path / "file.txt").write_text("0" * 1000)
    with subprocess.Popen([sys.executable, "-c", REPLACE, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0.02, 0.2))
        process.send_signal(signal.SIGKILL)
    folder, file = rounds(tmp_path)
    assert folder - 1 <= file <= folder
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "model"]
    assert rounds(tmp_path) == (folder, file)


def test_a_reader_never_finds_the_folder_missing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("0")
    missing = 0
    with subprocess.Popen([sys.executable, "-c", REPLACE, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            if not (tmp_path / "model").is_dir():
                missing += 1
        process.kill()
    assert missing == 0
    assert int((tmp_path / "model" / "a.txt").read_text()) > 1, "it was replaced meanwhile"
