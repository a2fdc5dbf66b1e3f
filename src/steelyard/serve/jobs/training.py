"""A fine-tuning job as a training run: its rows, its configuration, what `auto` means, what its measurements say."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.data import chat, preference
from steelyard.data.chat import FormatConfig
from steelyard.data.rows import Conversation, token_counts
from steelyard.data.split import remove_duplicates
from steelyard.data.tokenize import ADVICE, tokenize
from steelyard.errors import CheckpointError, DataError
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

MAX_LENGTH = 1024
"""Most tokens of a row."""
EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 8, 4e-4
PREFERENCE_RATE, BETA = 1e-4, 0.1
CHECKPOINT_STEPS = 10
"""Steps between states: the most that a killed run loses."""
KEPT_CHECKPOINTS = 3
MICRO_BATCH_TOKENS = 4096
"""Most tokens of a forward pass."""
LOGIT_ROWS = 1024
"""Logits of so many tokens are there at a time."""
PROCESS_BYTES = 550_000_000
"""Of a run without model and data."""

Row = dict[str, Any]


class Resolved(msgspec.Struct, frozen=True, omit_defaults=True):
    """What `auto` became."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None = None
    """Of preference learning alone."""


class Rows(msgspec.Struct, frozen=True):
    """What a job's files hold."""

    rows: int
    tokens: int
    """Of one epoch, trained on or not."""
    longest: int
    """Tokens of a row."""
    resolved: Resolved


def resolve(hyperparameters: Row, rows: int, method: str) -> Resolved:
    """Numbers for what is `auto`."""
    asked = {name: value for name, value in hyperparameters.items() if value not in (None, "auto")}
    return Resolved(
        n_epochs=asked.get("n_epochs", EPOCHS),
        batch_size=asked.get("batch_size", max(1, min(BATCH_SIZE, rows // 8))),
        learning_rate_multiplier=float(asked.get("learning_rate_multiplier", 1.0)),
        beta=float(asked.get("beta", BETA)) if method == "dpo" else None,
    )


def check_files(
    base: Path, training: Path, validation: Path | None, hyperparameters: Row, method: str = "supervised"
) -> Rows:
    """Read a job's rows as the run will.

    Raises:
        DataError: a row is wrong, by the name of its file, without the folder, and its line.
        CheckpointError: the model cannot chat.
        TemplateError: its template fails on a row.
    """
    tokenizer, template = Tokenizer.load(base), ChatTemplate.load(base)
    read = _pairs if method == "dpo" else _chats
    try:
        learnt = read(training)
        rows = tokenize(learnt, tokenizer, template, MAX_LENGTH)
        if validation is not None:
            held = read(validation)
            tokenize(held, tokenizer, template, MAX_LENGTH)
            seen = {row.prompt_key for row in learnt}
            for row in held:
                if row.prompt_key in seen:
                    raise DataError("the training file asks the same", file=validation, line=row.line)
    except DataError as error:
        name = None if error.file is None else Path(error.file).name
        reason = error.reason.removesuffix(ADVICE)  # there is no run.toml to change
        raise DataError(reason, file=name, line=error.line, field=error.field) from None
    finally:
        if template is not None:
            template.close()
    counts, answers = token_counts(rows), 2 if method == "dpo" else 1
    count, longest = len(rows) // answers, answers * counts["longest_row"]
    return Rows(count, counts["tokens"], longest, resolve(hyperparameters, count, method))


def _chats(path: Path) -> Sequence[Conversation]:
    return remove_duplicates(chat.read(path, FormatConfig(format="chat")))


def _pairs(path: Path) -> Sequence[Conversation]:
    """Both answers of every row, one after the other."""
    return [side for row in preference.read(path) for side in (row.preferred, row.other)]


def memory(base: Path, rows: Rows) -> int:
    """Bytes that a run takes, by estimate: weights, and for each token of a forward pass what backward needs of it.

    A block keeps some twelve vectors of the width and three of the feed-forward part in bfloat16; of logits a chunk is
    there at a time. Somewhat above what runs took that were measured.
    """
    config = manifest.read_json(base / "config.json")
    width, inner, layers, vocabulary = (
        size(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    together = max(rows.longest, min(MICRO_BATCH_TOKENS, rows.longest * rows.resolved.batch_size))
    logits = 2 * min(together, LOGIT_ROWS) * vocabulary
    return PROCESS_BYTES + weights + logits + together * 2 * layers * (12 * width + 3 * inner)


def size(config: Row, name: str) -> int:
    """A size in a model's config.json.

    Raises:
        CheckpointError: it is not there.
    """
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the model's config.json has no '{name}'")
    return value


def base_to_train(checkpoint: Path) -> Path:
    """The dense model to learn on: a served one, or what an int8 one was made from.

    Raises:
        CheckpointError: a compressed model whose parent is not known here.
    """
    config = manifest.read_json(checkpoint / "config.json")
    if "quantization_config" not in config:
        return checkpoint
    raise CheckpointError(
        "this model is compressed: no gradient passes its rounding; serve the model that it was made from, and"
        " fine-tune that"
    )


def write_configuration(
    path: Path,
    *,
    base: Path,
    run: Path,
    training: Path,
    validation: Path | None,
    resolved: Resolved,
    seed: int,
    threads: int,
) -> None:
    """Write the run.toml of a job."""
    top: Row = {
        "model": str(base),
        "output": str(run),
        "seed": seed,
        "epochs": resolved.n_epochs,
        "batch_size": resolved.batch_size,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "checkpoint_every": CHECKPOINT_STEPS,
        "keep_checkpoints": KEPT_CHECKPOINTS,
        "threads": threads,
    }
    data: Row = {"train": str(training), "max_length": MAX_LENGTH}
    rate = LEARNING_RATE
    if resolved.beta is None:
        data["format"] = "chat"
    else:
        top |= {"task": "preference", "beta": resolved.beta}
        rate = PREFERENCE_RATE
    if validation is not None:
        data["validation"] = str(validation)
    optimizer = {"name": "adamw", "learning_rate": rate * resolved.learning_rate_multiplier}
    lines = [*_table(top), "", "[data]", *_table(data), "", "[optimizer]", *_table(optimizer)]
    write_file(path, "\n".join(lines) + "\n")


def described(values: Row, steps: int) -> str:
    """What an event says of a step."""
    parts = [f"training loss={values['loss']:.4f}"] if "loss" in values else []
    if "validation_loss" in values:
        parts.append(f"validation loss={values['validation_loss']:.4f}")
    return f"Step {values['step']}/{steps}: {', '.join(parts)}"


def event_data(values: Row, steps: int) -> Row:
    """The data of such an event, under OpenAI's names."""
    names = {"loss": "train_loss", "validation_loss": "full_valid_loss"}
    found = {new: values[old] for old, new in names.items() if old in values}
    return {"step": values["step"], "total_steps": steps, **found}


def metrics_csv(measured: Sequence[Row]) -> bytes:
    """A run's measurements as OpenAI's result file has them."""
    steps: dict[int, Row] = {}
    for values in measured:
        steps.setdefault(values["step"], {}).update(values)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "train_loss", "valid_loss"])
    for step, values in sorted(steps.items()):
        writer.writerow([step, values.get("loss", ""), values.get("validation_loss", "")])
    return text.getvalue().encode()


def _table(values: Row) -> list[str]:
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]  # such JSON is TOML
