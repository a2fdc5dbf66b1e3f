"""Fine-tuning jobs: chat rows to an adapter of a served model, and one for each checkpoint on its way."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from steelyard.errors import DataError, RequestError
from steelyard.runs import read_metrics
from steelyard.serve.billing.ledger import Service
from steelyard.serve.files import Files
from steelyard.serve.files import get as get_file
from steelyard.serve.jobs import training
from steelyard.serve.jobs.kind import Advance, Checked, Made, Progress
from steelyard.serve.tuned import TunedModels, model_name

COMMAND = ["train", "run.toml", "--json"]

Row = dict[str, Any]


class FineTuning:
    """See `Kind`.

    Args:
        files: for training files and result files.
        tuned: for bases, and for what jobs make.
    """

    service: Service = "fine_tuning"
    called = "fine-tuning"

    def __init__(self, files: Files, tuned: TunedModels) -> None:
        self.files, self.tuned = files, tuned

    def check(self, job: Row) -> Checked:
        """Read its files as the run will."""
        base, method = self._base(job), job["settings"].get("method", "supervised")
        with contextlib.ExitStack() as stack:
            learnt, held = (
                None if file is None else stack.enter_context(self.files.clear(job["project_id"], file, name))
                for name, file in (
                    ("training.jsonl", self._artifact(job, "training")),
                    ("validation.jsonl", self._artifact(job, "validation")),
                )
            )
            assert learnt is not None
            try:
                found = training.check_files(base, learnt, held, job["settings"]["hyperparameters"], method)
            except DataError as error:
                raise self._named(job, error) from None
        return Checked(
            f"Files validated, moving job to queued state: {found.rows} rows, {found.tokens} tokens an epoch",
            training.memory(base, found),
            msgspec.to_builtins(found.resolved),
            found.tokens * found.resolved.n_epochs,
        )

    def prepare(self, job: Row, folder: Path, threads: int) -> list[str]:
        """Its rows, clear, and its run.toml."""
        if (folder / "run.toml").exists():  # it goes on as it began, whoever had begun it
            return COMMAND
        paths = {kind: self._written(job, kind, folder) for kind in ("training", "validation")}
        assert paths["training"] is not None
        training.write_configuration(
            folder / "run.toml",
            base=self._base(job),
            run=folder / "run",
            training=paths["training"],
            validation=paths["validation"],
            resolved=msgspec.convert(job["resolved"], training.Resolved),
            seed=job["seed"],
            threads=threads,
        )
        return COMMAND

    def progress(self, job: Row, folder: Path, *, ended: bool) -> Progress:
        """From what the run has measured. The newest step may still be evaluated: it waits for the next one."""
        steps: dict[int, Row] = {}
        for values in read_metrics(folder / "run"):
            steps.setdefault(values["step"], {}).update(values)
        if not steps:
            return Progress()
        tokens = sum(values.get("tokens", 0) for values in steps.values())
        newest = max(steps)
        total = max(newest, round((job["tokens"] or tokens) / max(1.0, tokens / len(steps))))
        advances = [
            Advance(step, training.described(values, total), training.event_data(values, total))
            for step, values in sorted(steps.items())
            if ended or step < newest
        ]
        return Progress(advances, tokens, steps[newest].get("seconds_left"))

    def publish(self, job: Row, folder: Path, now: int) -> Made:
        """The best as the job's model, each checkpoint as one of its own, the measurements as a file."""
        project, run = job["project_id"], folder / "run"
        name = model_name("ft", job, self.tuned.project_name(project))
        keep = partial(self.tuned.keep, project, job["model"], now=now, job_id=job["id"], form="adapter")
        made = [keep(name=name, source=run / "best")]
        for checkpoint in sorted((run / "checkpoints").glob("step-*")):
            step = int(checkpoint.name.rpartition("-")[2])
            made.append(keep(name=f"{name}:ckpt-step-{step}", source=checkpoint, step=step))
        stored = self.files.artifacts.put(project, [training.metrics_csv(read_metrics(run))])
        file = self.files.add(project, "step_metrics.csv", "fine-tune-results", stored, now)
        return Made(made, f"New fine-tuned model created: {name}", [file["id"]])

    def _base(self, job: Row) -> Path:
        return training.base_to_train(self.tuned.checkpoint(job["project_id"], job["model"]))

    def _artifact(self, job: Row, kind: str) -> str | None:
        file = job[f"{kind}_file"]
        if file is None:
            return None
        row = self.files.database.read_now(partial(get_file, project=job["project_id"], file_id=file))
        name: str = row["artifact"]
        return name

    def _written(self, job: Row, kind: str, folder: Path) -> Path | None:
        file, path = job[f"{kind}_file"], folder / f"{kind}.jsonl"
        if file is None or path.exists():
            return None if file is None else path
        return self.files.write_clear_file(job["project_id"], file, path)

    def _named(self, job: Row, error: DataError) -> RequestError:
        """What is wrong with a file, under the name that its owner knows."""
        kind = "validation" if error.file == "validation.jsonl" else "training"
        find = partial(get_file, project=job["project_id"], file_id=job[f"{kind}_file"])
        shown = self.files.database.read_now(find)["filename"]
        message = str(DataError(error.reason, file=shown, line=error.line, field=error.field))
        return RequestError(message, param=f"{kind}_file", code=f"invalid_{kind}_file")
