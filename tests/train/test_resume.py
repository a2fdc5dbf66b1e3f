"""A run that is killed or stopped, and run again by the same command, ends with the same weights to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 36


def write_run(folder: Path, model: Path) -> Path:
    """A configuration of a LoRA run of 36 steps with dropout; its output is `folder / "run"`."""
    folder.mkdir()
    turns = [
        [{"role": "user", "content": f"weigh {i}"}, {"role": "assistant", "content": f"{i * i} g"}] for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    (folder / "run.toml").write_text(
        f'model = "{model}"\noutput = "{folder / "run"}"\nepochs = 3\nbatch_size = 2\ncheckpoint_every = 2\n'
        f'threads = 1\n[data]\ntrain = "{folder / "rows.jsonl"}"\n[lora]\nrank = 4\ndropout = 0.1\n'
    )
    return folder / "run"


def begin(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "output.txt").open("ab") as output:
        command = [sys.executable, "-m", "steelyard", "train", str(folder / "run.toml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def finish(folder: Path) -> None:
    code = begin(folder).wait(timeout=60)
    assert code == 0, (folder / "output.txt").read_text()


def signal_at(folder: Path, step: int, number: signal.Signals, delay: float = 0.0) -> int:
    """Start the run, send it a signal once it has measured `step`; returns its exit code."""
    process, metrics = begin(folder), folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_bytes().splitlines()) >= step:
            time.sleep(delay)
            break
        time.sleep(0.001)
    process.send_signal(number)
    return process.wait(timeout=60)


def losses(run: Path) -> list[tuple[int, float]]:
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(point["step"], point["loss"]) for point in points if "loss" in point]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    run = write_run(folder, tiny_model)
    finish(folder)
    return run


def demand_equal(run: Path, whole: Path) -> None:
    for name in ("best", "last"):
        path = Path(name) / "adapter_model.safetensors"
        assert (run / path).read_bytes() == (whole / path).read_bytes()
    assert losses(run) == losses(whole)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))


def test_killed_three_times_it_ends_the_same(tiny_model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    run = write_run(folder, tiny_model)
    for step in (random.randint(3, 9), random.randint(13, 18), random.randint(22, 28)):
        code = signal_at(folder, step, signal.SIGKILL, delay=random.random() * 0.02)
        assert code == -signal.SIGKILL, f"step {step}: {(folder / 'output.txt').read_text()}"
    finish(folder)
    assert "resumed at step" in (run / "log.txt").read_text()
    demand_equal(run, whole)


def test_stopped_it_saves_and_a_damaged_state_falls_back(tiny_model: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    run = write_run(folder, tiny_model)
    assert signal_at(folder, 9, signal.SIGTERM) == 130
    older, newest = sorted((run / "state").glob("step-*"))
    assert newest.name == f"step-{losses(run)[-1][0]:08d}"  # nothing of what was done is lost
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    finish(folder)
    step = int(older.name.removeprefix("step-"))
    assert f"resumed at step {step} of {STEPS}" in (run / "log.txt").read_text()
    demand_equal(run, whole)
