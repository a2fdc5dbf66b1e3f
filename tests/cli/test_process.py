"""The command line as a process of its own: exit codes, pipes, terminals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEELYARD = [sys.executable, "-m", "steelyard"]


def run(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*STEELYARD, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_an_error_is_one_line_on_stderr_and_an_exit_code(tmp_path: Path) -> None:
    done = run("data", tmp_path / "none.csv", "--json")
    assert done.returncode == 3
    assert done.stderr.decode().count("\n") == 1
    assert json.loads(done.stdout)["error"]["code"] == "invalid_data"


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    path = tmp_path / "Grüße.jsonl"
    path.write_text('{"text": "ä", "label": "größe 😀"}\n{"text": "b", "label": "x"}\n')
    done = run("data", path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe" in done.stdout
    assert run("data", path, "--json", PYTHONIOENCODING="ascii").returncode == 0


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n{"text": "b", "label": "x"}\n')
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*STEELYARD, "data", str(path), "--json"], stdout=writing, stderr=subprocess.PIPE, check=False, timeout=120
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("stdin", "complaint"), [(b"\xff", "byte 0 is not UTF-8"), (b"x" * (9 << 20), "the prompt is over 8 MB")]
)
def test_a_prompt_on_standard_input_that_is_none(tmp_path: Path, stdin: bytes, complaint: str) -> None:
    done = run("generate", tmp_path, "-", stdin=stdin)
    assert done.returncode == 3
    assert done.stderr.decode().strip() == f"error: standard input: {complaint}"
