"""Compression jobs: a served model, or one that a job made, to a smaller one of its own, with a certificate."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from steelyard.checkpoint import manifest
from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.errors import DataError, NotFoundError, RequestError
from steelyard.serve.billing.ledger import Service
from steelyard.serve.files import Files
from steelyard.serve.files import get as get_file
from steelyard.serve.jobs import training
from steelyard.serve.jobs.kind import Checked, Made, Progress
from steelyard.serve.protocol.compression import FILE_OF
from steelyard.serve.tuned import TunedModels, model_name
from steelyard.text.chat_template import ChatTemplate

PROCESS_BYTES = 400_000_000
"""Of a run without model."""
ROWS = "calibration.jsonl"
JUDGED, HELD = "judged.jsonl", "held.jsonl"
"""A search's rows: every fourth is measured on."""
CERTIFIED_TOKENS = 4096
"""Of a forward pass of the certificate, which keeps four float32 logits of each."""

Row = dict[str, Any]


class Compression:
    """See `Kind`.

    Args:
        files: for calibration data.
        tuned: for models to compress, and for what jobs make.
    """

    service: Service = "compression"
    called = "compression"

    def __init__(self, files: Files, tuned: TunedModels) -> None:
        self.files, self.tuned = files, tuned

    def check(self, job: Row) -> Checked:
        """Whether its model is there, and dense."""
        source = self.tuned.checkpoint(job["project_id"], job["model"])
        base = manifest.base_of(source)
        config = manifest.read_json(base / "config.json")
        if "quantization_config" in config:
            raise RequestError("this model is compressed already: name the one that it was made from", param="model")
        if job["training_file"] is not None:
            self._check_rows(job, base)
        weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        # A search has the model in float32 and an engine of it besides; a run its masters and both moments.
        copies = 3 if kind_of(job)[0] in ("quantize", "prune") else 10
        memory = PROCESS_BYTES + copies * weights + CERTIFIED_TOKENS * 16 * training.size(config, "vocab_size")
        return Checked("The model can be compressed, moving job to queued state", memory)

    def _check_rows(self, job: Row, base: Path) -> None:
        """Whether its rows are chats, which the model reads."""
        param = field_of(job)
        if ChatTemplate.load(base) is None:
            raise RequestError("this model has no chat template, which rows of chats need", param=param)
        try:
            find = partial(get_file, project=job["project_id"], file_id=job["training_file"])
            row = self.files.database.read_now(find)
        except NotFoundError as error:
            raise RequestError(str(error), param=param) from None
        with self.files.clear(job["project_id"], row["artifact"], ROWS) as path:
            try:
                chat.read(path, FormatConfig(format="chat"))
            except DataError as error:
                named = DataError(error.reason, file=row["filename"], line=error.line, field=error.field)
                raise RequestError(str(named), param=param, code="invalid_calibration_file") from None

    def prepare(self, job: Row, folder: Path, threads: int) -> list[str]:
        """Nothing of an earlier try is used, but what a search or a recipe has done."""
        shutil.rmtree(folder / "made", ignore_errors=True)
        kind, asked = kind_of(job)
        source = str(self.tuned.checkpoint(job["project_id"], job["model"]))
        if job["training_file"] is not None:
            self.files.write_clear_file(job["project_id"], job["training_file"], folder / ROWS)
        if kind == "distill":
            (folder / "recipe.toml").write_text(_recipe(source, asked))
            return ["compress", "recipe", "recipe.toml", "--json"]
        if kind == "target":
            _divide(folder)
            rows = ["--data", JUDGED, "--held", HELD]
            return ["compress", "search", source, "--output", "searched", *rows, "--target", asked["goals"], "--json"]
        command = ["compress", kind, source, "--output", "made", "--json"]
        if kind == "quantize":
            command += ["--bits", asked.get("scheme", "int8").removeprefix("int")]
        for field in ("group", "method", "structure", "rate", "pattern", "max_bits_per_byte", "max_kl"):
            if asked.get(field) is not None:
                command += [f"--{field.replace('_', '-')}", str(asked[field])]
        if asked.get("portable"):
            command.append("--portable")
        if job["training_file"] is not None:
            command += ["--data", ROWS]
        return command

    def progress(self, job: Row, folder: Path, *, ended: bool) -> Progress:
        """It takes a minute and has no steps."""
        return Progress()

    def publish(self, job: Row, folder: Path, now: int) -> Made:
        """The smaller model."""
        kind, asked = kind_of(job)
        made = folder / ("searched/best" if kind == "target" else "made")
        called = {"prune": "pruned", "distill": "distilled", "target": "searched"}.get(kind) or asked.get(
            "scheme", "int8"
        )
        name = model_name(called, job, self.tuned.project_name(job["project_id"]))
        keep = self.tuned.keep(job["project_id"], job["model"], name, made, now, job_id=job["id"], form="model")
        found = manifest.read(made).certificate or {}
        cost = f"{found['bytes_before'] / 1e6:.1f} to {found['bytes_after'] / 1e6:.1f} MB" if found else "smaller"
        return Made([keep], f"New compressed model created: {name}, {cost}")


def kind_of(job: Row) -> tuple[str, Row]:
    """What a job is asked for (a method, or `target`), and its settings."""
    ((kind, asked),) = job["settings"].items()
    return kind, asked


def field_of(job: Row) -> str:
    """By which field of the request it names its file."""
    kind, _ = kind_of(job)
    return "calibration_file" if kind == "target" else f"method.{kind}.{FILE_OF[kind]}"


def _recipe(source: str, asked: Row) -> str:
    """Fewer blocks, taught by the model, quantised; JSON's strings and numbers are TOML's, too."""
    settings = {"model": source, "output": "made", "data": ROWS, "max_bits_per_byte": asked["max_bits_per_byte"]}
    if asked["max_kl"] is not None:
        settings["max_kl"] = asked["max_kl"]
    steps: list[Row] = [
        {"kind": "prune", "structure": "blocks", "method": "divergence", "rate": asked["rate"]},
        {"kind": "train", "method": "full", "epochs": asked["n_epochs"], "data.train": ROWS}
        | {"distill.weight": asked["weight"], "optimizer.learning_rate": asked["learning_rate"]},
    ]
    if asked["scheme"] is not None:
        steps.append({"kind": "quantize", "bits": int(asked["scheme"].removeprefix("int"))})
    tables = [settings, *steps]
    return "\n[[step]]\n".join("".join(f"{key} = {json.dumps(value)}\n" for key, value in t.items()) for t in tables)


def _divide(folder: Path) -> None:
    lines = (folder / ROWS).read_text().splitlines(keepends=True)
    (folder / HELD).write_text("".join(lines[::4]))
    (folder / JUDGED).write_text("".join(line for number, line in enumerate(lines) if number % 4))
