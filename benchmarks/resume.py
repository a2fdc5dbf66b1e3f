"""Training of SmolLM2-135M killed again and again (SIGKILL): are the weights those of an uninterrupted run?

    python benchmarks/resume.py --kills 3 --json resume.json
    python benchmarks/resume.py --kills 50 --method full

One run goes to its end undisturbed. Another, by the same command, is killed at moments drawn at random over its
running time (while it loads, computes, evaluates or writes a state), started again each time, and then left to end.
Every file of both results is compared to the bit, and so are the losses of all steps. What a kill costs is counted:
the steps that had to be done again, which may not exceed the interval between states.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo import lifecycle, sms

EVERY = 3  # steps between states


def write_run(folder: Path, base: Path, data: sms.Sms, method: str) -> None:
    """The configuration of a run whose output is `folder / "run"`."""
    folder.mkdir()
    (folder / "run.toml").write_text(
        f'model = "{base}"\noutput = "{folder / "run"}"\nmethod = "{method}"\nepochs = 1\nbatch_size = 4\n'
        f'checkpoint_every = {EVERY}\nevaluate_every = 8\n[data]\ntrain = "{data.train}"\nholdout = 8\n'
        f'labels = ["ham", "spam"]\ntemplate = "{{text}}"\n[lora]\ndropout = 0.1\n'
        f"[optimizer]\nlearning_rate = {4e-4 if method == 'lora' else 2e-5}\n"
    )


def begin(folder: Path) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it."""
    with (folder / "output.txt").open("ab") as output:
        command = [sys.executable, "-m", "steelyard", "train", str(folder / "run.toml")]
        return subprocess.Popen(command, stdout=output, stderr=output)


def finish(folder: Path) -> float:
    """Let the run go to its end; returns the seconds that it took."""
    started = time.perf_counter()
    if begin(folder).wait() != 0:
        sys.exit((folder / "output.txt").read_text())
    return time.perf_counter() - started


def steps_measured(folder: Path) -> int:
    """The last step that the run measured."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every weights file of the results, by relative path."""
    files = sorted([*folder.glob("run/best/*.safetensors"), *folder.glob("run/last/*.safetensors")])
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(folder: Path) -> list[tuple[int, float]]:
    """`(step, loss)` of all steps."""
    points = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(point["step"], point["loss"]) for point in points if "loss" in point]


def kill(folder: Path, delay: float) -> dict[str, Any] | None:
    """Start the run and kill it after `delay` seconds; None if it had ended before."""
    process = begin(folder)
    try:
        process.wait(timeout=delay)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    states = sorted(int(path.name.removeprefix("step-")) for path in (folder / "run" / "state").glob("step-*"))
    reached, kept = steps_measured(folder), max(states, default=0)
    print(f"  killed after {delay:.1f} s at step {reached}; state of step {kept} is kept", flush=True)
    return {"seconds": delay, "step": reached, "lost": max(0, reached - kept)}


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--labels", type=int, default=104, help="rows to learn from; 8 of them are held out")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn if not given")
    parser.add_argument("--quick", action="store_true", help="one kill, 28 rows")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    labels, wanted = (28, 1) if options.quick else (options.labels, options.kills)
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    draw = random.Random(seed)
    base, collection = lifecycle.fetch(default_cache(), lambda what, done, total: None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = sms.prepare(collection, folder / "data", labels, 0)
        whole, killed = folder / "whole", folder / "killed"
        write_run(whole, base, data, options.method)
        write_run(killed, base, data, options.method)
        seconds = finish(whole)
        print(f"uninterrupted: {len(losses(whole))} steps in {seconds:.1f} s; moments drawn from seed {seed}")
        kills: list[dict[str, Any]] = []
        while len(kills) < wanted:
            # Each start has to get somewhere, or fifty kills would never reach the end of the run.
            found = kill(killed, draw.uniform(0.1, 0.6) * seconds)
            if found is None:  # it came to its end: begin anew, the comparison holds for every round
                if digests(killed) != digests(whole):
                    break
                shutil.rmtree(killed / "run")
                continue
            kills.append(found)
        finish(killed)
        same = digests(killed) == digests(whole) and losses(killed) == losses(whole)
        files = digests(whole)
    lost = max(kill["lost"] for kill in kills)
    short: list[dict[str, Any]] = []
    if not same:
        short.append({"name": "identical", "measured": False, "target": True})
    if lost > EVERY:
        short.append({"name": "steps_lost_per_kill", "measured": lost, "target": f"<= {EVERY}"})
    print(
        f"{len(kills)} kills: weights {'identical to the bit' if same else 'DIFFER'}; at most {lost} steps lost by one"
    )
    print(f"short of target: {short or 'nothing'}")
    if options.json is not None:
        result = {"method": options.method, "seed": seed, "kills": kills, "identical": same, "files": files}
        options.json.write_text(json.dumps({**result, "quick": options.quick, "short": short}, indent=2) + "\n")


if __name__ == "__main__":
    main()
