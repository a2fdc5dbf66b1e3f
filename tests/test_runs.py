"""A run's folder: one process at a time, one configuration, and metrics that survive being cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.errors import ConfigError
from steelyard.runs import Run, clear, read_metrics

CONFIG: dict[str, Any] = {"model": "base", "data": {"train": "rows.jsonl", "labels": ("a", "b")}, "clip": None}


def test_it_records_its_configuration_and_what_happens(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "one", CONFIG)
    run.log("größe 😀")
    run.measure(step=1, loss=0.5)
    run.measure(step=2, validation_loss=0.25)
    run.close()
    assert json.loads((run.folder / "run.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert (run.folder / "log.txt").read_text("utf-8").endswith(" größe 😀\n")
    assert read_metrics(run.folder) == [{"step": 1, "loss": 0.5}, {"step": 2, "validation_loss": 0.25}]
    Run(run.folder, CONFIG).close()


def begun(folder: Path) -> None:
    """A run that has done a step."""
    run = Run(folder, CONFIG)
    run.measure(step=1, loss=0.5)
    run.close()


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"model": "other"}, "model"),
        ({"data": {"train": "rows.jsonl", "labels": ("a", "c")}}, "data.labels"),
        ({"data": {}}, "data.labels"),
        ({"threads": 2}, "threads"),
        ({"data": "rows.jsonl"}, "data"),
    ],
)
def test_another_configuration_is_refused_and_lets_go(tmp_path: Path, changed: dict[str, Any], key: str) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match=f"holds a run with another '{key}': choose another output, or --fresh"):
        Run(tmp_path, CONFIG | changed)
    Run(tmp_path, CONFIG).close()


def test_a_setting_that_came_later_does_not_count_where_it_is_unset(tmp_path: Path) -> None:
    Run(tmp_path, {"model": "base"}).close()
    Run(tmp_path, {"model": "base", "clip": None}).close()


@pytest.mark.parametrize("content", ["", "{", '{"model": ', "[" * 100_000])
def test_a_damaged_configuration(tmp_path: Path, content: str) -> None:
    begun(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json' is damaged: choose another output, or --fresh"):
        Run(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["[]", "5", "null"])
def test_a_configuration_that_is_none(tmp_path: Path, content: str) -> None:
    begun(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="holds a run with another"):
        Run(tmp_path, CONFIG)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "run"):
        with pytest.raises(ConfigError, match="cannot make the run's folder"):
            Run(folder, CONFIG)
    assert (tmp_path / "file").read_text() == "precious"


HOLDER = """
import sys, time
from pathlib import Path
from steelyard.runs import Run
run = Run(Path(sys.argv[1]), {})
print("in", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_and_a_kill_lets_the_next_in(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        for attempt in (lambda: Run(tmp_path, {}), lambda: clear(tmp_path)):
            with pytest.raises(ConfigError, match="another process is running in"):
                attempt()
        holder.send_signal(signal.SIGKILL)
    Run(tmp_path, {}).close()


@given(st.integers(0, 200), st.integers(0, 6))
def test_metrics_cut_off_anywhere_lose_only_what_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int, upto: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder, {})
    for step in range(1, 6):
        run.measure(step=step, loss=1 / step)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    kept = whole[: max(len(whole) - cut, 0)]
    path.write_bytes(kept)
    lines = kept.split(b"\n")
    complete = len(lines) - 1 + (lines[-1].endswith(b"}"))
    assert [values["step"] for values in run.metrics()] == list(range(1, complete + 1))
    run.rewind(upto)
    assert [values["step"] for values in run.metrics()] == list(range(1, min(upto, complete) + 1))
    run.measure(step=upto + 1)
    assert run.metrics()[-1] == {"step": upto + 1}, "what is measured next stands on a line of its own"
    run.close()


def test_lines_that_are_no_metrics_are_left_out(tmp_path: Path) -> None:
    Run(tmp_path, {}).close()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n5\n[]\nnull\n\xff\n{"loss": 1}\n')
    run = Run(tmp_path, {})
    assert run.metrics() == [{"step": 1}, {"loss": 1}]
    run.rewind(0)
    assert run.metrics() == [{"loss": 1}]
    run.close()


def test_a_run_that_did_nothing_takes_another_configuration(tmp_path: Path) -> None:
    Run(tmp_path, CONFIG).close()
    Run(tmp_path, CONFIG | {"clip": 1.0}).close()
    assert json.loads((tmp_path / "run.json").read_text())["clip"] == 1.0


@pytest.mark.parametrize("name", ["thesis.txt", "config.json", "log.txt", "src/main.py"])
def test_a_folder_of_something_else_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and is no run's folder: name another output"):
        Run(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="is not a run's folder: --fresh will not empty it"):
        clear(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "precious"


def test_clearing_takes_what_the_run_left_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear(tmp_path / "none")
    run = tmp_path / "run"
    begun(run)
    (run / "best").mkdir()
    clear(run)
    assert not run.exists()
    begun(run)
    (run / "state" / "step-1").mkdir(parents=True)
    (run / "thesis.txt").write_text("precious")
    clear(run)
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]
    here = tmp_path / "here"
    begun(here)
    monkeypatch.chdir(here)
    clear(Path())
    assert list(here.iterdir()) == []


def test_keys_that_an_earlier_version_did_not_know_had_their_defaults(tmp_path: Path) -> None:
    defaults = {"newer": 3, "inner": {"a": 1, "b": 2}}
    run = Run(tmp_path, {"inner": {"a": 1}})
    run.measure(step=1)
    run.close()
    Run(tmp_path, {"newer": 3, "inner": {"a": 1, "b": 2}}, defaults).close()
    with pytest.raises(ConfigError, match="another 'newer'"):
        Run(tmp_path, {"newer": 4, "inner": {"a": 1, "b": 2}}, defaults)
    with pytest.raises(ConfigError, match=r"another 'inner\.b'"):
        Run(tmp_path, {"newer": 3, "inner": {"a": 1, "b": 5}}, defaults)
