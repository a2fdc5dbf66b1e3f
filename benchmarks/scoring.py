"""Scoring over HTTP against the lm-evaluation-harness's own Hugging Face backend, on the same weights.

    python benchmarks/scoring.py --json scoring.json

The harness (in an environment of its own under bench/lmeval) runs two local tasks: `messages`, whether a text message
is spam by which word is likelier, and `passages`, the bits per byte of pieces of the Brown corpus. It asks a server of
ours (`local-completions`: echo with logprobs, prompts as token ids and as text) for the model as it is and in int8, and
it runs the model itself in the same dtype and in float32.

Targets: what ours says of a request differs from what the harness's own forward pass says in the same dtype by at most
twice what that differs from float32, on average: what is left is rounding. int8 says the same of tokens as of text to
the bit, and costs at most 3% more bits per byte than float32.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import workload
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize import layout
from steelyard.demo import sms
from steelyard.demo.lifecycle import MODEL
from steelyard.demo.serving import serving
from steelyard.models import weights

FOLDER = Path("bench/lmeval").absolute()
TORCH, HARNESS = "torch==2.13.0", "lm-eval[api]==0.4.13"  # torch first: the CPU build
TASKS = ("messages", "passages")
PASSAGE = 900  # characters
ROUNDING = 2.0
INT8_COST = 1.03
Found = dict[str, dict[str, Any]]
"""By task: the harness's metrics, and the log-likelihood of every request by (document, place among its requests)."""


def environment() -> Path:
    """The harness's environment; returns its bin folder."""
    bin_ = FOLDER / "bin"
    if not (bin_ / "lm_eval").is_file():
        venv.create(FOLDER, with_pip=True)
        for packages in ([TORCH], [HARNESS, "transformers", "accelerate"]):
            subprocess.run([bin_ / "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)
    return bin_


def write_tasks(folder: Path, messages: int, passages: int) -> None:
    """The two tasks and their data, from seeded places."""
    draw = random.Random(0)
    collection = sms.fetch(default_cache(), lambda name, done, size: None)
    with collection.open(encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row[0] in sms.LABELS]
    chosen = [
        row for label in sms.LABELS for row in draw.sample([row for row in rows if row[0] == label], messages // 2)
    ]
    documents = [{"text": text, "label": sms.LABELS.index(label)} for label, text, *_ in chosen]
    write(folder / "messages.jsonl", documents)
    corpus = workload.brown(FOLDER)
    begins = [corpus.index(" ", draw.randrange(len(corpus) - 2 * PASSAGE)) + 1 for _ in range(passages)]
    write(folder / "passages.jsonl", [{"text": corpus[begin : begin + PASSAGE]} for begin in begins])
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "Text message: {{text}}\nHam or spam? This message is",
        "doc_to_choice": list(sms.LABELS),
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for name, kind in zip(TASKS, (choice, rolling), strict=True):
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        # YAML reads JSON.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **data, **kind}))


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    """Rows of JSON."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def evaluate(bin_: Path, tasks: Path, name: str, model: str, arguments: dict[str, Any], key: str = "") -> Found:
    """One run of the harness."""
    output = tasks / name
    command: list[str | Path] = [bin_ / "lm_eval", "run", "--model", model, "--tasks", *TASKS, "--include_path", tasks]
    command += ["--model_args", *(f"{field}={value}" for field, value in arguments.items())]
    command += ["--output_path", output, "--log_samples", "--device", "cpu", "--batch_size", "8"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(FOLDER / "cache")}
    with (tasks / f"{name}.log").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, env={**os.environ, **offline, "OPENAI_API_KEY": key}
        )
    (results,) = output.rglob("results_*.json")
    metrics = json.loads(results.read_text())["results"]
    found: Found = {}
    for task in TASKS:
        (samples,) = output.rglob(f"samples_{task}_*.jsonl")
        figures = {metric.split(",")[0]: value for metric, value in metrics[task].items() if isinstance(value, float)}
        found[task] = {"metrics": figures, "likelihoods": likelihoods(samples)}
        print(f"{name:14} {task:9} {figures}", flush=True)
    return found


def likelihoods(samples: Path) -> dict[str, float]:
    """The log-likelihood of every request."""
    found = {}
    for line in samples.read_text().splitlines():
        document = json.loads(line)
        for place, response in enumerate(document["filtered_resps"]):
            value = response[0] if isinstance(response, list) else response
            found[f"{document['doc_id']}-{place}"] = float(value)
    return found


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Mean difference of the log-likelihoods of the same requests, in nats."""
    mine: dict[str, float] = one["likelihoods"]
    others: dict[str, float] = other["likelihoods"]
    assert mine.keys() == others.keys()
    return sum(abs(mine[key] - others[key]) for key in mine) / len(mine)


def compare(runs: dict[str, Found]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The differences by name, and those over their target."""
    figures: dict[str, float] = {}
    short = []

    def check(name: str, measured: float, limit: float) -> None:
        figures[name] = measured
        if measured > limit:
            short.append({"name": name, "measured": measured, "target": f"<= {limit:.4g}"})

    for task in TASKS:
        by_run = {name: found[task] for name, found in runs.items()}
        rounding = distance(by_run["hf-bf16"], by_run["hf-fp32"])
        figures[f"{task}: hf-bf16 to hf-fp32"] = rounding
        for ours in ("bf16-tokens", "bf16-text"):
            check(f"{task}: {ours} to hf-bf16", distance(by_run[ours], by_run["hf-bf16"]), ROUNDING * rounding)
        check(f"{task}: int8-tokens to int8-text", distance(by_run["int8-tokens"], by_run["int8-text"]), 0.0)
        figures[f"{task}: int8-tokens to hf-fp32"] = distance(by_run["int8-tokens"], by_run["hf-fp32"])
    bits = {name: found["passages"]["metrics"]["bits_per_byte"] for name, found in runs.items()}
    check("int8 bits per byte over hf-fp32", bits["int8-tokens"] / bits["hf-fp32"], INT8_COST)
    return figures, short


def main() -> None:
    """Set up, run every side, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the documents")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    bin_, base = environment(), pull(MODEL, cache=default_cache())
    tasks = FOLDER / ("quick" if options.quick else "tasks")
    subprocess.run(["rm", "-rf", tasks], check=True)
    tasks.mkdir(parents=True)
    write_tasks(tasks, *((20, 4) if options.quick else (100, 20)))
    packed = tasks / "int8"
    packed.mkdir()
    layout.write(weights.load(base), packed, base)
    runs: dict[str, Found] = {}
    for dtype, name in (("float32", "hf-fp32"), ("bfloat16", "hf-bf16")):
        runs[name] = evaluate(bin_, tasks, name, "hf", {"pretrained": base, "dtype": dtype})
    with serving(tasks / "server.log", base, packed) as (url, key):
        for folder, name in ((base, "bf16"), (packed, "int8")):
            for tokenized in (True, False):
                arguments = {
                    "model": folder.name,
                    "base_url": f"{url}/completions",
                    "tokenizer": base,
                    "tokenizer_backend": "huggingface",
                    "tokenized_requests": tokenized,
                    "max_length": 2048,
                    "max_retries": 1,
                }
                label = f"{name}-{'tokens' if tokenized else 'text'}"
                runs[label] = evaluate(bin_, tasks, label, "local-completions", arguments, key)
    figures, short = compare(runs)
    for name, measured in figures.items():
        print(f"{name:44} {measured:.5f}")
    print(f"short of target: {[entry['name'] for entry in short] or 'nothing'}")
    if options.json is not None:
        metrics = {name: {task: found[task]["metrics"] for task in TASKS} for name, found in runs.items()}
        result = {"quick": options.quick, "metrics": metrics, "differences": figures, "short": short}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
