"""The tagger of `tasks.py --only brown`, asked over HTTP: is it as good as it is measured to be?

    python benchmarks/tagging.py --json tagging.json
    python benchmarks/tagging.py --only chained

Trains it by itself and with a chain of labels (what was cut off goes on, what is finished is taken as it is, `--folder`
is that of `tasks.py`), measures it by `steelyard evaluate`, serves it by `steelyard serve`, and sends the held-out
sentences to `POST /v1/tag` as words. Targets: an accuracy of 0.982 by itself over HTTP, and at most one word in 1,000
that has another tag than by `steelyard predict`: a tagger runs in bfloat16, where two tags can be equally likely to the
last bit, and which of them is found is a matter of what runs beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import tasks
from steelyard.data.chat import FormatConfig
from steelyard.serve.keys import new_key
from steelyard.stages.evaluate import evaluate
from steelyard.stages.predict import predict

ACCURACY, OTHERS = 0.982, 0.001
TOGETHER = 64
"""Sentences of a request."""
KINDS = {"alone": False, "chained": True}
Found = dict[str, Any]


@contextmanager
def serving(checkpoint: Path, folder: Path) -> Iterator[httpx.Client]:
    """A server of its own, and a client with its key."""
    key = new_key()
    environment = {**os.environ, "STEELYARD_API_KEY": key, "STEELYARD_HOME": str(folder / "state")}
    command = [
        sys.executable,
        "-m",
        "steelyard",
        "serve",
        str(checkpoint),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--json",
    ]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert server.stdout is not None, "it is piped"
    try:
        url = json.loads(server.stdout.readline())["url"]
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=600) as client:
            yield client
    finally:
        server.terminate()
        server.wait(60)


def asked(client: httpx.Client, sentences: list[list[str]]) -> list[list[str]]:
    """Of each sentence the tags of its words."""
    (model,) = client.get("/models").raise_for_status().json()["data"]
    found: list[list[str]] = []
    for begin in range(0, len(sentences), TOGETHER):
        body = {"model": model["id"], "input": sentences[begin : begin + TOGETHER]}
        told = client.post("/tag", json=body).raise_for_status().json()["data"]
        found += [[word["tag"] for word in one["words"]] for one in told]
    return found


def measured(folder: Path, seed: int, quick: bool, chained: bool) -> Found:
    """One tagger, by itself and over HTTP."""
    config, held = tasks.brown_run(folder, seed, quick, chained)
    done, minutes = tasks.trained(config)
    checkpoint, place = Path(str(done.path)), Path(config.output)
    row = evaluate(checkpoint, held, FormatConfig())
    predict(checkpoint, held, place / "said.jsonl", FormatConfig())
    truth = [json.loads(line) for line in held.read_text().splitlines()]
    said = [json.loads(line)["prediction"] for line in (place / "said.jsonl").read_text().splitlines()]
    with serving(checkpoint, place) as client:
        started = time.perf_counter()
        told = asked(client, [one["tokens"] for one in truth])
        seconds = time.perf_counter() - started
    words = sum(len(one["tags"]) for one in truth)
    right = _alike(told, [one["tags"] for one in truth])
    return {
        "evaluated": row.accuracy,  # type: ignore[union-attr]
        "over_http": right / words,
        "other_tags": words - _alike(told, said),
        "sentences": len(truth),
        "words": words,
        "words_a_second": words / seconds,
        "training_minutes": minutes,
    }


def _alike(some: list[list[str]], others: list[list[str]]) -> int:
    """How many words have the same tag."""
    pairs = zip(some, others, strict=True)
    return sum(tag == other for one, two in pairs for tag, other in zip(one, two, strict=True))


def main() -> None:
    """Train, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("bench/tasks"))
    parser.add_argument("--quick", action="store_true", help="1,000 sentences, one epoch: does it work?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder / "quick" if options.quick else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Found] = {}
    for name, chained in KINDS.items():
        if options.only in (None, name):
            found[name] = measured(folder, options.seed, options.quick, chained)
            print(name, found[name], flush=True)
    short = [
        f"{name}: {one['other_tags']} of {one['words']} words have another tag over HTTP"
        for name, one in found.items()
        if one["other_tags"] > OTHERS * one["words"] and not options.quick
    ]
    if "alone" in found and not options.quick and found["alone"]["over_http"] < ACCURACY:
        short.append(f"accuracy over HTTP: {found['alone']['over_http']:.4f}, {ACCURACY} wanted")
    print(f"short of target: {short or 'nothing'}")
    if options.json is not None:
        options.json.write_text(json.dumps({"quick": options.quick, "found": found, "short": short}, indent=2) + "\n")


if __name__ == "__main__":
    main()
