"""Compression jobs: a served model, or one that a job made, to a smaller one of its own, with a certificate."""

from __future__ import annotations

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
from steelyard.serve.tuned import TunedModels, model_name
from steelyard.text.chat_template import ChatTemplate

PROCESS_BYTES = 400_000_000
"""Of a run without model."""
ROWS = "calibration.jsonl"
CALIBRATION = "method.quantize.calibration_file"
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
        memory = PROCESS_BYTES + 3 * weights + CERTIFIED_TOKENS * 16 * training.size(config, "vocab_size")
        return Checked("The model can be compressed, moving job to queued state", memory)

    def _check_rows(self, job: Row, base: Path) -> None:
        """Whether its rows are chats, which the model reads."""
        if ChatTemplate.load(base) is None:
            raise RequestError("this model has no chat template, which rows of chats need", param=CALIBRATION)
        try:
            find = partial(get_file, project=job["project_id"], file_id=job["training_file"])
            row = self.files.database.read_now(find)
        except NotFoundError as error:
            raise RequestError(str(error), param=CALIBRATION) from None
        with self.files.clear(job["project_id"], row["artifact"], ROWS) as path:
            try:
                chat.read(path, FormatConfig(format="chat"))
            except DataError as error:
                named = DataError(error.reason, file=row["filename"], line=error.line, field=error.field)
                raise RequestError(str(named), param=CALIBRATION, code="invalid_calibration_file") from None

    def prepare(self, job: Row, folder: Path, threads: int) -> list[str]:
        """Nothing of an earlier try is used."""
        shutil.rmtree(folder / "made", ignore_errors=True)
        asked: Row = job["settings"]["quantize"]
        source = self.tuned.checkpoint(job["project_id"], job["model"])
        command = ["compress", "quantize", str(source), "--output", "made", "--json"]
        command += ["--bits", asked.get("scheme", "int8").removeprefix("int")]
        for field in ("group", "method", "max_bits_per_byte", "max_kl"):
            if asked.get(field) is not None:
                command += [f"--{field.replace('_', '-')}", str(asked[field])]
        if asked["portable"]:
            command.append("--portable")
        if job["training_file"] is not None:
            self.files.write_clear_file(job["project_id"], job["training_file"], folder / ROWS)
            command += ["--data", ROWS]
        return command

    def progress(self, job: Row, folder: Path, *, ended: bool) -> Progress:
        """It takes a minute and has no steps."""
        return Progress()

    def publish(self, job: Row, folder: Path, now: int) -> Made:
        """The smaller model."""
        scheme = job["settings"]["quantize"].get("scheme", "int8")
        name = model_name(scheme, job, self.tuned.project_name(job["project_id"]))
        keep = self.tuned.keep(
            job["project_id"], job["model"], name, folder / "made", now, job_id=job["id"], form="model"
        )
        found = manifest.read(folder / "made").certificate or {}
        cost = f"{found['bytes_before'] / 1e6:.1f} to {found['bytes_after'] / 1e6:.1f} MB" if found else "smaller"
        return Made([keep], f"New compressed model created: {name}, {cost}")
