"""What decoding costs and keeps: beams beside samples, and JSON schemas, on SmolLM2-135M in int8.

    python benchmarks/decoding.py --json decoding.json
    python benchmarks/decoding.py --only beams

`beams`: four beams of a request against four samples of it, in turns; at most 1.6 times the time.
`schemas`: 50 schemas of rising difficulty, 20 seeds each, drawn at a temperature of 0.7, 16 at once. Of 1,000 answers
at least 95% end by themselves, and all of these are valid by the `jsonschema` library; keywords that are not kept are
refused by name. `speed`: 16 streams with a schema of long texts and without, in turns; at least 0.9 times the tokens
a second.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec

import workload
from peers.contenders import FOLDER as PEERS
from schemas import REFUSED, SCHEMAS
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.demo.lifecycle import MODEL
from steelyard.errors import RequestError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Beam, Request, Sampling
from steelyard.stages.compress import quantize
from steelyard.text import grammar
from steelyard.text.chat_template import ChatTemplate

FOLDER = Path("bench/decoding").absolute()
BEAMS, BEAM_COST = 4, 1.6
TOKENS, MOST = 64, 400
"""Of an answer of `beams`, exactly; of one to a schema, at most."""
TOGETHER, SEEDS = 16, 20
ENDED, SPEED = 0.95, 0.9
Found = dict[str, Any]


class Bench:
    """An engine and its prompts."""

    def __init__(self) -> None:
        base, folder = pull(MODEL, cache=default_cache()), FOLDER / "int8"
        if not (folder / "steelyard.json").is_file():
            quantize(base, folder, QuantizeConfig(group="auto"))
        template = ChatTemplate.load(base)
        assert template is not None, "it is a chat model"
        self.template = template
        self.engine = Engine.load(folder, config=EngineConfig(reuse=False))

    def prompt(self, text: str) -> list[int]:
        """A user's message as token ids."""
        told = self.template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        return self.engine.tokenizer.encode_rendered(told)

    def run(self, requests: Sequence[Request]) -> tuple[dict[str, tuple[str, str, int]], float]:
        """Of each request its text, why it ended and its tokens; and how long all took."""
        found: dict[str, tuple[str, str, int]] = {}
        started = time.perf_counter()
        for output in self.engine.run(requests):
            text, _, _ = found.get(output.id, ("", "", 0))
            found[output.id] = text + output.text, output.finish_reason or "", output.completion_tokens
        return found, time.perf_counter() - started


def beams(bench: Bench, quick: bool) -> Found:
    """Seconds of an answer, and how likely the model finds the best: greedily, of some samples, by as many beams."""
    rows = workload.make(workload.brown(PEERS), bench.engine.tokenizer, 3 if quick else 12)["w1"]
    prompts = [bench.prompt(row["messages"][0]["content"]) for row in rows]
    sampling = Sampling(max_tokens=TOKENS, seed=1, ignore_eos=True)
    told = msgspec.structs.replace(sampling, logprobs=0)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"sampling": msgspec.structs.replace(told, temperature=0)},
        "samples": {"n": BEAMS, "sampling": told},
        "beams": {"beam": Beam(width=BEAMS), "sampling": sampling},
    }
    seconds, nats = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for number, prompt in enumerate(prompts):
        for name, fields in ways.items():
            started, found = time.perf_counter(), dict[int, float]()
            for output in bench.engine.run([Request(id=f"{name}-{number}", prompt=prompt, **fields)]):
                likely = sum(token.logprob for token in output.logprobs or ())
                if output.score is not None:  # a beam's, by its length
                    likely = output.score * output.completion_tokens
                found[output.choice] = found.get(output.choice, 0.0) + likely
            seconds[name] += time.perf_counter() - started
            nats[name] += max(found.values())
    return {
        **{name: value / len(prompts) for name, value in seconds.items()},
        **{f"{name}_log_probability": value / len(prompts) for name, value in nats.items()},
        "ratio": seconds["beams"] / seconds["samples"],
    }


def schemas(bench: Bench, quick: bool) -> Found:
    """How many answers end by themselves, and how many of those are valid."""
    rows: dict[str, dict[str, Any]] = {}
    for name, schema in SCHEMAS.items():
        rules = grammar.of_schema(schema, "schema")
        asked = f"Make up an example as JSON, short and complete. Its schema is: {json.dumps(schema)}"
        requests = [
            Request(
                id=str(seed),
                prompt=bench.prompt(asked),
                grammar=rules,
                sampling=Sampling(max_tokens=MOST, temperature=0.7, seed=seed),
            )
            for seed in range(2 if quick else SEEDS)
        ]
        found, seconds = bench.run(requests)
        ended = [text for text, reason, _ in found.values() if reason == "stop"]
        bad = [text for text in ended if not _valid(text, schema)]
        rows[name] = {"asked": len(found), "ended": len(ended), "invalid": bad, "seconds": seconds}
        print(f"{name:14} {len(ended):3} of {len(found)} ended, {len(bad)} invalid, {seconds:5.1f} s", flush=True)
    wrong = {name: said for name, schema in REFUSED.items() if name not in (said := _refusal(schema))}
    total, over = sum(row["asked"] for row in rows.values()), sum(row["ended"] for row in rows.values())
    invalid = sum(len(row["invalid"]) for row in rows.values())
    return {"schemas": rows, "ended": over / total, "invalid": invalid, "not_refused_by_name": wrong}


def _valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def _refusal(schema: dict[str, Any]) -> str:
    try:
        grammar.of_schema(schema, "schema")
    except RequestError as error:
        return str(error)
    return ""


def speed(bench: Bench, quick: bool) -> Found:
    """Tokens a second of 16 streams, with a schema of long texts and without any, each of so many tokens."""
    rows = workload.make(workload.brown(PEERS), bench.engine.tokenizer, TOGETHER)["w1"]
    prompts = [bench.prompt(row["messages"][0]["content"]) for row in rows]
    item = {"type": "object", "properties": {"word": {"type": "string", "minLength": 300}}, "required": ["word"]}
    rules = grammar.of_schema({"type": "array", "items": item, "minItems": 50}, "schema")
    best: dict[str, float] = {}
    for turn in range(1 if quick else 4):
        for name, held in (("free", None), ("held", rules)):
            sampling = Sampling(max_tokens=128, temperature=0.7, seed=turn, ignore_eos=held is None)
            requests = [
                Request(id=str(number), prompt=prompt, sampling=sampling, grammar=held)
                for number, prompt in enumerate(prompts)
            ]
            found, seconds = bench.run(requests)
            rate = sum(tokens for _, _, tokens in found.values()) / seconds
            best[name] = max(best.get(name, 0.0), rate)
    return {**best, "ratio": best["held"] / best["free"]}


PARTS: dict[str, Callable[[Bench, bool], Found]] = {"beams": beams, "schemas": schemas, "speed": speed}


def shortfalls(found: dict[str, Found]) -> list[dict[str, Any]]:
    """What is under its target."""
    wanted: list[tuple[str, bool, Any, str]] = []
    if "beams" in found:
        ratio = found["beams"]["ratio"]
        wanted.append(("time of four beams over four samples", ratio <= BEAM_COST, ratio, f"<= {BEAM_COST}"))
    if "schemas" in found:
        got = found["schemas"]
        wanted.append(("answers that end", got["ended"] >= ENDED, got["ended"], f">= {ENDED}"))
        wanted.append(("answers that end and are not valid", got["invalid"] == 0, got["invalid"], "0"))
        wrong = sorted(got["not_refused_by_name"])
        wanted.append(("keywords that are not refused by name", not wrong, wrong, "none"))
    if "speed" in found:
        ratio = found["speed"]["ratio"]
        wanted.append(("tokens a second with a schema over without", ratio >= SPEED, ratio, f">= {SPEED}"))
    return [
        {"name": name, "measured": measured, "target": target} for name, good, measured, target in wanted if not good
    ]


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="few prompts and seeds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    bench = Bench()
    found: dict[str, Found] = {}
    for name, part in PARTS.items():
        if options.only in (None, name):
            found[name] = part(bench, options.quick)
            print(name, {key: value for key, value in found[name].items() if key != "schemas"}, flush=True)
    short = [] if options.quick else shortfalls(found)
    print(f"short of target: {short or 'nothing'}")
    if options.json is not None:
        options.json.write_text(json.dumps({"found": found, "quick": options.quick, "short": short}, indent=2) + "\n")


if __name__ == "__main__":
    main()
