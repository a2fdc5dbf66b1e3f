"""A draft: a small decoder that guesses a larger one's tokens where that is asked about what it was made for.

Some blocks of the model stay; they learn from its own answers to prompts of a domain (Kim and Rush 2016), and on demand
from what it holds of every token there, to go on as it does; they run in 8 bits, with a head for the tokens that the
domain has. What a draft says is only ever a guess, so that answers stay what they are, whatever it has learnt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.atomic import file_aside, folder_aside
from steelyard.checkpoint import manifest
from steelyard.compress.prune import structured
from steelyard.data import chat
from steelyard.data.rows import Conversation, Message
from steelyard.data.tokenize import prompts
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate.likelihood import packs
from steelyard.infer.engine import Engine
from steelyard.infer.request import Request, Sampling
from steelyard.models import head_tokens, weights
from steelyard.models.attention import PackedAttention
from steelyard.models.opening import Opened, open_checkpoint
from steelyard.stages import recipe as recipes
from steelyard.stages.compress import token_rows
from steelyard.stages.recipe import Recipe
from steelyard.train.trainer import Trainer

Showing = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
ANSWERS = "answers.jsonl"
PROMPT = 32
"""Tokens of a plain text after which the model goes on."""
MEASURED = 1 << 13
"""Tokens of answers by which a draft is judged."""


class DraftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a draft is made of."""

    blocks: int = 4
    """How many of the model's stay."""
    head: int = 4096
    """How many tokens its head has, the commonest of the domain; 0: all."""
    prompts: int = 512
    """Of the domain's rows, at most."""
    answer: int = 96
    """Tokens of an answer, at most."""
    epochs: int = 6
    learning_rate: float = 1e-3
    batch_size: int = 8
    teacher: float = 0.0
    """Share of the loss that is what the model holds of every token, besides the one that it said; each takes a pass
    through the model."""


class Drafted(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    path: str
    finished: bool
    """False: its run was interrupted; the same command goes on."""
    agreement: float
    """How often its likeliest token is the model's, in answers that it has learnt from."""
    bytes: int
    answers: int
    """Rows that it learnt from."""


def draft(
    model: Path,
    data: Path,
    output: Path,
    config: DraftConfig = DraftConfig(),  # noqa: B008
    *,
    showing: Showing = lambda what: nullcontext(lambda done, of: None),
    begun: Callable[[Trainer], None] = lambda trainer: None,
) -> Drafted:
    """Make a draft of a model for a domain.

    Args:
        model: a dense decoder.
        data: rows of the domain: chats, whose last answer is asked for anew, or texts, whose beginnings are gone on
            from.
        output: where the draft goes; what leads to it stands beside it, in `OUTPUT-steps`.
        config: how.
        showing: where the progress of each step is told.
        begun: given the run's trainer; may set `trainer.stopping` later.

    Raises:
        ConfigError: settings that do not fit the model, or an output that is something else.
        DataError: a row; file, line and field are named.
        CheckpointError: no dense decoder.
    """
    manifest.check_output(output, model)
    opened = open_checkpoint(model)
    layers = opened.decoder.config.layers
    if not 0 < config.blocks < layers:
        raise ConfigError(f"a draft of {config.blocks} blocks: 1 to {layers - 1} of the model's {layers} are possible")
    if config.head < 0 or min(config.prompts, config.answer, config.epochs) < 1:
        raise ConfigError("prompts, answer and epochs are at least 1, head is at least 0")
    steps = output.with_name(f"{output.name}-steps")
    answers = steps / ANSWERS
    known = steps / "asked.json"
    asked = {
        "model": manifest.read(model).id,
        "data": manifest.sha256_file(data),
        "prompts": config.prompts,
        "answer": config.answer,
    }
    if not (answers.is_file() and known.is_file() and manifest.read_json(known) == asked):
        with showing("the model's own answers") as report:
            write_answers(opened, data, answers, config.prompts, config.answer, report)
        with file_aside(known) as file:
            file.write((json.dumps(asked, indent=2) + "\n").encode())
    learnt = _cut(opened, model, steps / "cut", answers, config)
    run: dict[str, Any] = {
        "method": "full",
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "data": {"train": str(answers), "max_length": 512, "too_long": "truncate"},
        "optimizer": {"name": "adamw", "learning_rate": config.learning_rate},
    }
    if config.teacher:
        run["distill"] = {"teacher": str(model), "weight": config.teacher, "temperature": 1.0}
    made = Recipe(
        output=str(steps / "whole"),
        model=str(steps / "cut"),
        max_bits_per_byte=1e9,
        step=({"kind": "train", **run}, {"kind": "quantize", "bits": 8, "group": "all"}),
    )
    done = recipes.follow(made, accept=True, showing=showing, begun=begun)
    if not done.finished:
        return Drafted(path=str(output), finished=False, agreement=0.0, bytes=0, answers=0)
    with folder_aside(output) as folder:
        for file_ in manifest.model_files(steps / "whole"):
            (folder / file_.name).write_bytes(file_.read_bytes())
        made_of = manifest.read(steps / "whole")
        recipe = {**made_of.recipe, "draft": msgspec.to_builtins(config)}
        manifest.complete(folder, parent=manifest.read(model).id, data=made_of.data, recipe=recipe)
    return Drafted(
        path=str(output),
        finished=True,
        agreement=agreement(opened, output, answers),
        bytes=sum(path.stat().st_size for path in output.glob("*.safetensors")),
        answers=learnt,
    )


def _cut(opened: Opened, model: Path, folder: Path, answers: Path, config: DraftConfig) -> int:
    """Leave some blocks, and name the tokens that answers have; how many rows of them there are."""
    rows, layers = token_rows(opened, answers, 1 << 40), opened.decoder.config.layers
    counts = Counter(token for row in rows for token in row.tokens)
    kept = sorted(token for token, _ in counts.most_common(config.head)) if config.head else []
    asked = [config.blocks, kept]
    if (folder / manifest.MANIFEST).is_file() and manifest.read(folder).recipe.get("cut") == asked:
        return len(rows)
    found = structured.even(layers, config.blocks)
    smaller, fields = structured.cut(opened.decoder, "blocks", 1 - config.blocks / layers, found)
    with manifest.writing(folder, parent=manifest.read(model).id, recipe={"cut": asked}) as place:
        weights.save(smaller, place, opened.base)
        values = {**manifest.read_json(place / "config.json"), **fields}
        (place / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        if kept:
            head_tokens.write(place, kept)
    return len(rows)


def write_answers(
    opened: Opened, data: Path, output: Path, most: int, tokens: int, report: Callable[[int, int], None]
) -> None:
    """Write what a model itself says, greedily, to the prompts of rows: what sequence-level distillation learns from.

    Args:
        opened: the model.
        data: see `draft`.
        output: chats with the model's answer, texts with the model's going on; JSONL.
        most: rows, at most.
        tokens: of an answer, at most.
        report: told (answers, of how many).

    Raises:
        DataError: a row, or none that asks anything.
    """
    context = opened.decoder.config.context
    found = list(islice(((row, ids) for row, ids in _asked(opened, data) if 0 < len(ids) < context), most))
    if not found:
        raise DataError("no row asks anything that the model's context holds", file=data)
    engine = Engine(opened.decoder, opened.tokenizer)
    sampling = Sampling(max_tokens=tokens, temperature=0)
    texts, done = [""] * len(found), 0
    requests = [Request(id=str(place), prompt=ids, sampling=sampling) for place, (_, ids) in enumerate(found)]
    for piece in engine.run(requests):
        texts[int(piece.id)] += piece.text
        if piece.finish_reason is not None:
            done += 1
            report(done, len(found))
    output.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(output) as file:
        for (row, _), text in zip(found, texts, strict=True):
            if row.messages[0].role == "text":
                line: dict[str, Any] = {"text": row.messages[0].content + text}
            else:
                turns = [{"role": turn.role, "content": turn.content} for turn in row.messages]
                line = {"messages": [*turns, {"role": "assistant", "content": text}]}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _asked(opened: Opened, data: Path) -> Iterator[tuple[Conversation, list[int]]]:
    """What is asked: rows without the answer, and their tokens."""
    tokenizer, template = opened.tokenizer, opened.template
    for row in chat.iterate(data):
        if row.messages[0].role == "text":
            ids = tokenizer.encode_plain(row.messages[0].content)
            for begin in range(0, max(1, len(ids) - PROMPT), 8 * PROMPT):
                part = ids[begin : begin + PROMPT]
                text = Message("text", tokenizer.decode(part))
                yield msgspec.structs.replace(row, messages=(text,)), [*tokenizer.beginning, *part]
            continue
        if template is None:
            raise ConfigError("this model has no chat template, which chats need: give it plain texts")
        turns = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
        asked = msgspec.structs.replace(row, messages=turns)
        yield asked, prompts([asked], tokenizer, template)[0]


@torch.inference_mode()
def agreement(opened: Opened, folder: Path, answers: Path) -> float:
    """How often a draft's likeliest token is the model's, at the trained tokens of rows."""
    smaller, same, count = weights.load(folder), 0, 0
    kept = head_tokens.read(folder, smaller.config.vocabulary)
    for batch in packs(token_rows(opened, answers, MEASURED)):
        whole, guessed = (
            decoder.logits(decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))[batch.places])
            for decoder in (opened.decoder, smaller)
        )
        likeliest = guessed.argmax(-1) if kept is None else kept[guessed[:, kept].argmax(-1)]
        same += int((likeliest == whole.argmax(-1)).sum())
        count += len(batch.places)
    return same / count
