"""Explanations: how far each method can be believed, ours and captum's, what one takes, and what others lose meanwhile.

    python benchmarks/explain.py --json explain.json
    python benchmarks/explain.py --only sms,newsgroups,sms-decoder
    python benchmarks/explain.py --only cost

`sms`: the LSTM of 4,000 messages; `newsgroups`: MiniLM on 20 Newsgroups (both trained by `tasks.py`, in the same
folder); `sms-decoder`: SmolLM2-135M tuned on 400 messages, its label explained. Held-out texts and the class that the
model finds, as many of each; of each method the area under the probability as tokens go (deletion, lower is better) and
come (insertion, higher), comprehensiveness and sufficiency, over eleven places, and seconds of one thread. Relevance
propagation has to beat gradient x input and random orders by both areas: 95% intervals of paired differences.
`cost`: a server over SmolLM2-135M in int8; eight streams of one project, alone and while another project asks for
explanations without pause: tokens a second have to stay above 0.8 of what they were.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from captum.attr import (  # type: ignore[import-untyped]
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    ShapleyValueSampling,
)
from torch import nn

import load
import sms as sms_bench
import tasks
import workload
from peers.contenders import FOLDER as PEERS
from reliability_server import Server
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.demo import lifecycle
from steelyard.demo import sms as messages
from steelyard.evaluate import classification
from steelyard.explain import faithfulness
from steelyard.explain.decoders import LabelSubject
from steelyard.explain.explainer import open_classifier, open_decoder
from steelyard.explain.methods import METHODS
from steelyard.explain.subject import Subject, at_once, log_odds
from steelyard.explain.texts import TextSubject
from steelyard.models.classifiers import Classifier, of_texts
from steelyard.models.inputs import padded
from steelyard.models.lora import Adapter
from steelyard.stages.compress import quantize
from steelyard.stages.train import train
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.source import marked, source_of_chat
from steelyard.text.tokenizer import Tokenizer

GRID = tuple(place / 10 for place in range(11))
TEXTS, POSTS, DECODED = 200, 60, 160
"""Messages, posts, and messages of the decoder."""
LONGEST = 120
"""Tokens of a text that is explained: Shapley values take a pass for every token, ten times over."""
STREAMS, PROMPTS = 8, 128
KEPT = 0.8
Found = dict[str, Any]
Attribution = Callable[[], torch.Tensor]
"""Shares `[U]` of one text's units."""


class Embedded(nn.Module):
    """A classifier from its embeddings on, as captum wants it: `[B, L, D]` -> `[B]`."""

    def __init__(self, classifier: Classifier, tokens: list[int], target: int) -> None:
        super().__init__()
        self.network, self.target = classifier.network, target
        self.token_ids, self.lengths = padded([tokens])
        self.layer = next(layer for layer in self.network.modules() if isinstance(layer, nn.Embedding))

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """Log-odds of the target."""
        hook = self.layer.register_forward_hook(lambda *_: embedded)
        rows = len(embedded)
        logits = self.network(self.token_ids.expand(rows, -1), self.lengths.expand(rows))
        hook.remove()
        return log_odds(logits, self.target)


def captums(classifier: Classifier, tokens: list[int], target: int, subject: TextSubject) -> dict[str, Attribution]:
    """Captum's methods of one text."""
    network, before = Embedded(classifier, tokens, target), (len(tokens) - subject.units + 1) // 2
    embedded = network.layer(torch.tensor([tokens]))
    base = network.layer.weight.mean(0).expand_as(embedded)

    def kept(masks: torch.Tensor) -> torch.Tensor:
        return at_once(subject.likelihood(masks.bool()))

    def of_tokens(found: torch.Tensor) -> torch.Tensor:
        return found[0].sum(-1)[before : before + subject.units].detach().double()

    every = torch.ones(1, subject.units)
    return {
        "captum input x gradient": lambda: of_tokens(
            InputXGradient(network).attribute(embedded.clone().requires_grad_())
        ),
        "captum integrated gradients": lambda: of_tokens(
            IntegratedGradients(network).attribute(embedded, base, n_steps=50, internal_batch_size=10)
        ),
        "captum feature ablation": lambda: FeatureAblation(kept).attribute(every, 0)[0].double(),
        "captum Shapley sampling": lambda: ShapleyValueSampling(kept).attribute(every, 0, n_samples=10)[0].double(),
    }


def measured(subject: Subject, ways: dict[str, Attribution]) -> dict[str, dict[str, float]]:
    """Of each way what its order does to the probability; and of random orders."""
    found: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        began = time.perf_counter()
        shares = way()
        seconds = time.perf_counter() - began
        own, chance = at_once(faithfulness.measure(subject, shares, grid=GRID, drawn=0 if found else 5))
        found[name] = {**_figures(own), "seconds": seconds}
        if "random" not in found:
            found["random"] = {**_figures(chance), "seconds": 0.0}
    return found


def _figures(one: Any) -> dict[str, float]:
    return {name: getattr(one, name) for name in ("deletion", "insertion", "comprehensiveness", "sufficiency")}


def ours(subject: Subject, names: Sequence[str]) -> dict[str, Attribution]:
    """Our methods of one subject."""
    return {name: lambda name=name: at_once(METHODS[name](subject)).units for name in names}  # type: ignore[misc]


def of_classifier(checkpoint: Path, held: Path, count: int) -> Found:
    """Held-out texts of a classifier."""
    classifier = open_classifier(checkpoint)
    rows = [row.text or "" for row in chat.read(held, FormatConfig())]
    random.Random(0).shuffle(rows)
    texts = [text for text in rows if 5 <= len(classifier.text.all_tokens(text)) <= LONGEST]
    classes = of_texts(classifier, texts)[0].argmax(-1).tolist()
    chosen = balanced(classes, count)
    each = []
    for number, (text, target) in enumerate((texts[row], classes[row]) for row in chosen):
        tokens = classifier.text.all_tokens(text)
        subject = TextSubject(classifier, tokens, target)
        ways = ours(subject, ("lrp", "gradient_x_input", "integrated_gradients", "occlusion"))
        each.append(measured(subject, ways | captums(classifier, tokens, target, subject)))
        if number % 20 == 19:
            print(f"  {number + 1} of {len(chosen)}", flush=True)
    return summary(each)


def balanced(classes: Sequence[int], count: int) -> list[int]:
    """Rows in turns of their classes: of one that is said of nearly everything little can be taken away."""
    queues = [[row for row, found in enumerate(classes) if found == each] for each in sorted(set(classes))]
    turns = [row for together in itertools.zip_longest(*queues) for row in together if row is not None]
    return turns[:count]


def of_decoder(folder: Path, quick: bool) -> Found:
    """Held-out messages and the label that a tuned decoder finds."""
    base, collection = lifecycle.fetch(default_cache(), lambda *_: None)
    labels = 60 if quick else 400
    place = folder / f"sms-decoder-{labels}"
    data = messages.prepare(collection, place / "data", labels, 0)
    recipe = lifecycle.recipe(base, data, place / "run", 1 if quick else sms_bench.epochs_for(labels), 0)
    adapter_folder = Path(train(recipe).run) / "last"
    decoder, tokenizer = open_decoder(base), Tokenizer.load(base)
    template, adapter = ChatTemplate.load(base), Adapter.load(adapter_folder, open_decoder(base))
    assert template is not None, "it is a chat model"
    format_ = FormatConfig(system=messages.SYSTEM, template="{text}", labels=messages.LABELS)
    rows = [row.text or "" for row in chat.read(data.held_out, FormatConfig())]
    random.Random(0).shuffle(rows)
    asked = [chat.asked(text, format_, None, None) for text in rows if len(text) >= 20][: 12 if quick else 800]
    questions = classification.questions(asked, format_.labels, tokenizer, template)
    scores = classification.score(decoder, adapter, questions)
    chosen = balanced(scores.argmax(-1).tolist(), 4 if quick else DECODED)
    each = []
    for number, row in enumerate(chosen):
        text, question, found = asked[row].messages[-1].content, questions[row], scores[row]
        turns = [{"role": turn.role, "content": turn.content} for turn in asked[row].messages]
        marks = [*turns[:-1], {**turns[-1], "content": marked(text)}]
        rendered = [
            template.render(tokenizer.guard_messages(each), add_generation_prompt=True) for each in (turns, marks)
        ]
        source = source_of_chat(tokenizer, *rendered)
        assert source.ids == question.prompt, "both are rendered alike"
        target = int(found.argmax())
        subject = LabelSubject(decoder, adapter, source.ids, question.answers, target, source.places or [])
        each.append(measured(subject, ours(subject, ("lrp", "gradient_x_input"))))
        if number % 5 == 4:
            print(f"  {number + 1} of {len(chosen)}", flush=True)
    return summary(each)


def summary(each: list[dict[str, dict[str, float]]]) -> Found:
    """Means, and how far relevance is ahead of the others by both areas, with intervals."""
    names, figures = list(each[0]), list(each[0]["lrp"])
    means = {
        name: {figure: statistics.fmean(one[name][figure] for one in each) for figure in figures} for name in names
    }
    ahead: Found = {}
    for other in (name for name in names if name != "lrp"):
        ahead[other] = {
            "deletion": interval([one[other]["deletion"] - one["lrp"]["deletion"] for one in each]),
            "insertion": interval([one["lrp"]["insertion"] - one[other]["insertion"] for one in each]),
        }
    for name, row in means.items():
        print(f"{name:28}" + "".join(f" {figure} {value:8.4f}" for figure, value in row.items()), flush=True)
    for name, row in ahead.items():
        print(f"ahead of {name:28} {row}", flush=True)
    return {"texts": len(each), "means": means, "lrp_ahead": ahead}


def interval(differences: list[float]) -> tuple[float, float, float]:
    """The mean, and between which it is with 95%, by drawing texts anew."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(1000))
    return statistics.fmean(differences), means[25], means[974]


class Int8Server(Server):
    """A server over the model in int8."""

    checkpoint = ""

    def command(self) -> list[str]:
        """See `Server`."""
        return [self.checkpoint if part == lifecycle.MODEL else part for part in super().command()]


def cost(folder: Path, quick: bool) -> Found:
    """Tokens a second of some streams, alone and beside explanations that are asked for without pause."""
    base = pull(lifecycle.MODEL, cache=default_cache())
    checkpoint = folder / "int8"
    if not (checkpoint / "steelyard.json").is_file():
        quantize(base, checkpoint, QuantizeConfig(group="auto"))
    rows = workload.make(workload.brown(PEERS), Tokenizer.load(base), 4 if quick else PROMPTS)["w1"]
    with tempfile.TemporaryDirectory() as place:
        server = Int8Server(Path(place), f"sqlite:///{place}/books.db", engine=True)
        server.checkpoint = str(checkpoint)
        server.start()
        try:
            return _shared(server, rows, quick)
        finally:
            server.stop()


def _shared(server: Server, rows: list[dict[str, Any]], quick: bool) -> Found:
    admin = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.admin}"}, timeout=60)
    project = admin.post("/organization/projects", json={"name": "explains"}).json()["id"]
    key = admin.post(f"/organization/projects/{project}/api_keys", json={"name": "explains"}).json()["value"]
    other = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=600)
    text = "Congratulations! You have won a prize. Text WIN to 80085 now, or call us on our free number tonight."
    body = {"model": "int8", "messages": [{"role": "user", "content": text}], "target": "spam"}
    seconds: list[float] = []

    def explain(until: threading.Event) -> None:
        while not until.is_set():
            began = time.perf_counter()
            answer = other.post("/explain", json=body)
            assert answer.status_code == 200, answer.text
            seconds.append(time.perf_counter() - began)

    def streams() -> Found:
        extra = {"max_tokens": 64, "ignore_eos": True}
        return asyncio.run(load.closed_loop(server.url, server.key, "int8", rows, STREAMS, extra))

    explain_once = threading.Event()
    explain_once.set()
    assert other.post("/explain", json=body).status_code == 200  # the float weights are there now
    alone_began = time.perf_counter()
    assert other.post("/explain", json=body).status_code == 200
    alone_seconds = time.perf_counter() - alone_began
    turns: list[dict[str, Found]] = []
    for _ in range(1 if quick else 4):  # in turns
        turn = {"alone": streams()}
        until = threading.Event()
        asking = threading.Thread(target=explain, args=(until,))
        asking.start()
        turn["beside"] = streams()
        until.set()
        asking.join()
        turns.append(turn)
        print({name: (found["tokens_per_second"], found["between_ms"]) for name, found in turn.items()}, flush=True)
    rates = {name: [turn[name]["tokens_per_second"] for turn in turns] for name in ("alone", "beside")}
    return {
        "turns": turns,
        "kept": statistics.median(b / a for a, b in zip(rates["alone"], rates["beside"], strict=True)),
        "explanation_seconds_alone": alone_seconds,
        "explanation_seconds_beside": statistics.median(seconds),
        "explanations": len(seconds),
    }


def shortfalls(found: dict[str, Found]) -> list[dict[str, Any]]:
    """What is under its target."""
    short = []
    for task, row in found.items():
        for other in ("gradient_x_input", "random") if "lrp_ahead" in row else ():
            for area, (mean, low, _) in row["lrp_ahead"][other].items():
                if low <= 0:
                    name = f"{task}: {area} ahead of {other}"
                    short.append({"name": name, "measured": (mean, low), "target": "> 0 with 95%"})
        if row.get("kept", 1.0) < KEPT:
            short.append({"name": "throughput beside explanations", "measured": row["kept"], "target": f">= {KEPT}"})
    return short


def _trained(run: Callable[[Path, int, bool], Any], folder: Path, quick: bool) -> tuple[Path, Path]:
    config, held = run(folder, 0, quick)
    done, _ = tasks.trained(config)
    return Path(str(done.path)), held


PARTS: dict[str, Callable[[Path, bool], Found]] = {
    "sms": lambda folder, quick: of_classifier(*_trained(tasks.sms_run, folder, quick), 6 if quick else TEXTS),
    "newsgroups": lambda folder, quick: of_classifier(
        *_trained(tasks.newsgroups_run, folder, quick), 6 if quick else POSTS
    ),
    "sms-decoder": of_decoder,
    "cost": cost,
}


def main() -> None:
    """Run the parts, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("bench/tasks"), help="where tasks.py leaves its runs")
    parser.add_argument("--quick", action="store_true", help="few texts, small runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    folder = asked.folder / "quick" if asked.quick else asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Found] = {}
    for name in asked.only.split(","):
        print(name, flush=True)
        found[name] = PARTS[name](folder, asked.quick)
    short = [] if asked.quick else shortfalls(found)
    print(f"short of target: {short or 'nothing'}")
    if asked.json is not None:
        asked.json.write_text(json.dumps({"found": found, "quick": asked.quick, "short": short}, indent=2) + "\n")


if __name__ == "__main__":
    main()
