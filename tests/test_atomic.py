"""Old content or new, never a mixture: after an exception and after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steelyard import atomic
from steelyard.atomic import file_aside, folder_aside, sweep, write_file

KILLED = """
import os, signal, sys
from pathlib import Path
from steelyard import atomic
path = Path(sys.argv[1])
if sys.argv[2] == "file":
    with atomic.file_aside(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
with atomic.folder_aside(path) as folder:
    (folder / "new.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_file(path, "old")
    write_file(path, b"new")
    assert content(tmp_path) == {"deep/a.txt": "new"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_survives_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with file_aside(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    for text in ("old", "new"):
        with folder_aside(tmp_path / "a") as folder:
            (folder / f"{text}.txt").write_text(text)
    assert content(tmp_path) == {"a/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_survives_an_exception(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")

    def failing() -> None:
        with folder_aside(tmp_path / "a") as folder:
            (folder / "new.txt").write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        failing()
    assert content(tmp_path) == {"a/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_leaves_the_old_and_sweep_removes_the_rest(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old.txt").write_text("old")
    before = content(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert content(tmp_path) != before, "the half-written one is there, aside"
    sweep(tmp_path)
    assert content(tmp_path) == before


def test_sweep_puts_an_old_folder_back_whose_successor_never_came(tmp_path: Path) -> None:
    old = tmp_path / f"{atomic.OLD}xyz" / "a"
    old.mkdir(parents=True)
    (old / "old.txt").write_text("old")
    sweep(tmp_path)
    assert content(tmp_path) == {"a/old.txt": "old"}


def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", "new")
    with pytest.raises(NotADirectoryError), folder_aside(tmp_path / "file"):
        pass
    assert content(tmp_path) == {"file": "old"}
