"""What teaching brings: a quarter of SmolLM2-135M's blocks less, and a draft of a domain.

    python benchmarks/distilled.py --json distilled.json
    python benchmarks/distilled.py --only draft

`blocks`: those without which least is lost go, what is left learns from the whole model on one half of Brown, and runs
in int8. Bits per byte of the other half by the engine's plan (peers/quality.py), tokens a second of an engine against
the whole model's in int8, and accuracy on the SMS task (400 labels, 1,000 messages held out) tuned alike.
`draft`: four blocks learn the whole model's answers to chatters' turns. Tokens a second of one stream with the draft,
with prompt look-up and without guesses, over answers to other chatters; all have to be the same to the token.

What is made is kept under `bench/distilled`, and gone on with where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

import sms
import workload
from assets import fetch
from peers import quality
from peers.contenders import FOLDER as PEERS
from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data import chat
from steelyard.data.tokenize import prompts
from steelyard.demo import lifecycle
from steelyard.infer import speed
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Request, Sampling
from steelyard.models import weights
from steelyard.stages.compress import quantize
from steelyard.stages.draft import DraftConfig, draft
from steelyard.stages.recipe import Recipe, follow
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

FOLDER = Path("bench/distilled").absolute()
THROUGHPUT, LONGER, ACCURACY = 1.15, 0.10, 0.02
"""Of fewer blocks: times the whole model's, at the least; rise of bits per byte and fall of accuracy, at the most."""
FASTER = 1.3
"""Of a draft: times the tokens a second without guesses."""
PASSAGE = 2000
ASKED, ANSWER = 40, 96
"""Held-out prompts, and tokens of an answer."""


def int8(base: Path) -> Path:
    """The whole model in int8, as `compress quantize` makes it."""
    folder = FOLDER / "int8"
    if not (folder / manifest.MANIFEST).is_file():
        quantize(base, folder, QuantizeConfig(group="auto"))
    return folder


def passages(path: Path, most: int | None) -> Path:
    """One half of Brown, cut into rows."""
    text = workload.brown(PEERS)
    text = text[: len(text) // 2]
    rows = [text[begin : begin + PASSAGE] for begin in range(0, len(text), PASSAGE)][:most]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def blocks(base: Path, collection: Path, quick: bool, most: int | None) -> dict[str, float]:
    """A quarter of the blocks less."""
    rows = passages(FOLDER / "passages.jsonl", 20 if quick else most)
    run: dict[str, Any] = {
        "method": "full",
        "epochs": 1,
        "batch_size": 4,
        "data": {"train": str(rows), "max_length": 512, "too_long": "truncate"},
        "distill": {"weight": 0.9, "temperature": 1.0},
        "optimizer": {"name": "adamw", "learning_rate": 3e-4},
    }
    recipe = Recipe(
        model=str(base),
        output=str(FOLDER / "fewer"),
        data=str(rows),
        step=(
            {"kind": "prune", "structure": "blocks", "method": "divergence", "rate": 0.25},
            {"kind": "train", **run},
            {"kind": "quantize", "bits": 8},
        ),
    )
    started = time.perf_counter()
    done = follow(recipe, accept=True)
    found = {"minutes": (time.perf_counter() - started) / 60}
    tokenizer, text = Tokenizer.load(base), quality.held_out(base)
    for name, folder in (("whole", int8(base)), ("fewer", FOLDER / "fewer")):
        fast = speed.measure(weights.load(folder), tokenizer, rounds=2 if quick else 5)
        found |= {f"{name}_throughput": fast.throughput, f"{name}_tokens_per_second": fast.tokens_per_second}
        found[f"{name}_bits_per_byte"] = text.bits(quality.ours(folder, text.windows))
    pruned = Path(done.steps[0])
    found["untaught_bits_per_byte"] = text.bits(quality.ours(pruned, text.windows))
    labels, epochs = (60, 1) if quick else (400, sms.epochs_for(400))
    for name, folder in (("whole", base), ("fewer", Path(done.steps[1]))):
        found[f"{name}_sms_accuracy"] = sms.one(folder, collection, labels, 0, epochs)["tuned_accuracy"]
    return found


def turns() -> Iterator[list[str]]:
    """What two say to each other: a question and its answer."""
    dialogues = json.loads(next(fetch("chitchat").rglob("dataset.json")).read_text())
    for dialogue in dialogues.values():
        said = [" ".join(message["text"] for message in turn) for turn in dialogue["messages"]]
        for asked, answered in zip(said[::2], said[1::2], strict=False):
            if 2 < len(asked.split()) < 60 and answered:
                yield [asked, answered]


def chats(path: Path, pairs: list[list[str]]) -> Path:
    """Rows of chats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for asked, answered in pairs:
            roles = (("user", asked), ("assistant", answered))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n")
    return path


def told(engine: Engine, asked: list[list[int]]) -> tuple[list[list[int]], float]:
    """Answers one after the other, as token ids, and tokens a second from each one's first token on."""
    answers: list[list[int]] = []
    seconds, counted = 0.0, 0
    for number, ids in enumerate(asked):
        sampling = Sampling(max_tokens=ANSWER, temperature=0)
        tokens: list[int] = []
        first = last = 0.0
        for output in engine.run([Request(id=str(number), prompt=ids, sampling=sampling)]):
            tokens += output.tokens
            last = time.perf_counter()
            if not first:
                first, began = last, len(tokens)
        answers.append(tokens)
        seconds, counted = seconds + last - first, counted + len(tokens) - began
    return answers, counted / seconds


def drafted(base: Path, quick: bool, config: DraftConfig) -> dict[str, float]:
    """A draft of a domain."""
    pairs = list(dict.fromkeys((asked, answered) for asked, answered in turns()))
    learnt = chats(FOLDER / "learnt.jsonl", [list(pair) for pair in pairs[ASKED : ASKED + config.prompts]])
    held = chats(FOLDER / "held.jsonl", [list(pair) for pair in pairs[: 4 if quick else ASKED]])
    started = time.perf_counter()
    made = draft(base, learnt, FOLDER / "draft", config)
    found = {"minutes": (time.perf_counter() - started) / 60, "agreement": made.agreement}
    tokenizer, template = Tokenizer.load(base), ChatTemplate.load(base)
    assert template is not None, "it is a chat model"
    asked = prompts(
        [msgspec.structs.replace(row, messages=row.messages[:-1]) for row in chat.iterate(held)],
        tokenizer,
        template,
    )
    small = int8(base)
    engines = {
        "plain": Engine.load(small, config=EngineConfig(speculate="off", reuse=False)),
        "lookup": Engine.load(small, config=EngineConfig(reuse=False)),
        "draft": Engine.load(small, config=EngineConfig(reuse=False), draft=FOLDER / "draft"),
    }
    answers = {}
    for _ in range(1 if quick else 3):  # in turns; the best of each
        for name, engine in engines.items():
            answers[name], rate = told(engine, asked)
            found[f"{name}_tokens_per_second"] = max(rate, found.get(f"{name}_tokens_per_second", 0.0))
    assert answers["draft"] == answers["lookup"] == answers["plain"], "guesses change no token"
    for name in ("lookup", "draft"):
        stats = engines[name].stats()
        found[f"{name}_accepted"] = stats.accepted_tokens / max(1, stats.drafted_tokens)
    return found


def shortfalls(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What is under its target."""
    wanted: list[tuple[str, float, str, float]] = []
    if "blocks" in found:
        got = found["blocks"]
        wanted += [
            ("throughput of fewer blocks", got["fewer_throughput"] / got["whole_throughput"], ">=", THROUGHPUT),
            ("bits per byte", got["fewer_bits_per_byte"] / got["whole_bits_per_byte"] - 1, "<=", LONGER),
            ("SMS accuracy lost", got["whole_sms_accuracy"] - got["fewer_sms_accuracy"], "<=", ACCURACY),
        ]
    if "draft" in found:
        got = found["draft"]
        wanted.append(
            ("speed with a draft", got["draft_tokens_per_second"] / got["plain_tokens_per_second"], ">=", FASTER)
        )
    return [
        {"name": name, "measured": value, "target": f"{sign} {target}"}
        for name, value, sign, target in wanted
        if (value < target if sign == ">=" else value > target)
    ]


def main() -> None:
    """Make, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["blocks", "draft"])
    parser.add_argument("--blocks", type=int, default=DraftConfig().blocks, help="of the draft")
    parser.add_argument(
        "--passages", type=int, help="of 2,000 letters that fewer blocks learn from; default: all, 1,400"
    )
    parser.add_argument("--prompts", type=int, default=DraftConfig().prompts, help="that the draft learns from")
    parser.add_argument("--epochs", type=int, default=DraftConfig().epochs, help="of the draft")
    parser.add_argument("--quick", action="store_true", help="few rows")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    base, collection = lifecycle.fetch(default_cache(), lambda what, done, total: None)
    found: dict[str, dict[str, float]] = {}
    if options.only != "draft":
        found["blocks"] = blocks(base, collection, options.quick, options.passages)
        print(json.dumps(found["blocks"], indent=2), flush=True)
    if options.only != "blocks":
        config = DraftConfig(blocks=options.blocks, prompts=options.prompts, epochs=options.epochs)
        if options.quick:
            config = DraftConfig(blocks=options.blocks, prompts=16, epochs=1)
        found["draft"] = drafted(base, options.quick, config)
        print(json.dumps(found["draft"], indent=2), flush=True)
    short = [] if options.quick else shortfalls(found)
    print(f"short of target: {short or 'nothing'}")
    if options.json is not None:
        options.json.write_text(json.dumps({"found": found, "quick": options.quick, "short": short}, indent=2) + "\n")


if __name__ == "__main__":
    main()
