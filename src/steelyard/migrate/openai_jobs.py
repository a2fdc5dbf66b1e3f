"""OpenAI's fine-tuning jobs made again on a server: first everything is checked, then files are sent and jobs created.

A job's metadata keeps what it was called at OpenAI (`openai_job`): so a second import finds what the first has made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from steelyard.errors import (
    AuthenticationError,
    ConfigError,
    DataError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    RequestError,
)
from steelyard.migrate.export import SUPERVISED, Export, Folder, Job, LocalFile
from steelyard.migrate.remote import Server
from steelyard.serve.files import MOST_BYTES
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.fine_tuning import JobRequest

ORIGIN = "openai_job"
"""The key in a job's metadata."""
MOST_PROBLEMS = 20
"""That a message names."""

Row = dict[str, Any]
State = Literal["to create", "created", "present", "left out", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job of the export."""

    job: Job
    state: State
    id: str | None = None
    """On the server."""
    reason: str | None = None
    """Why it was left out or refused."""


@dataclass(frozen=True)
class Plan:
    """What an import will do. Nothing is changed by making one."""

    outcomes: list[Outcome]
    """Of all jobs, in their order."""
    models: Mapping[str, str]
    """What stands for a base of OpenAI's."""
    files: Mapping[str, LocalFile]
    """By OpenAI's ids, those that jobs to create need."""
    known: Mapping[str, str] = field(default_factory=dict)
    """Ids on the server of files that an earlier import has sent."""


def plan(export: Export, folder: Folder, models: Mapping[str, str], server: Server) -> Plan:
    """Check an export against its files and a server.

    Args:
        export: the jobs.
        folder: where their files are.
        models: served models by the bases of OpenAI's that they stand for.
        server: where they are to be made.

    Raises:
        ConfigError: a base has no model that stands for it, or that one is not served.
        DataError: a file is missing or a row of it is wrong; all of them are named.
    """
    served = server.models()
    there = {origin: job for job in server.jobs() if (origin := (job["metadata"] or {}).get(ORIGIN)) is not None}
    outcomes = [_outcome(job, there) for job in export.jobs]
    wanted = [outcome.job for outcome in outcomes if outcome.state == "to create"]
    chosen = _models(wanted, models, served)
    return Plan(outcomes, chosen, _files(wanted, folder), _known(export, there))


def carry_out(plan: Plan, server: Server, tell: Callable[[str], None]) -> list[Outcome]:
    """Do what was planned.

    Args:
        plan: what to do.
        server: where.
        tell: gets a line about each thing that was done.

    Raises:
        RequestError: the key may not do this, or too much was asked for; what was done stays, and is found again.
    """
    sent: dict[str, str] = {}
    by_content: dict[str, str] = {}
    for file_id, file in plan.files.items():
        known = plan.known.get(file_id)
        if file.sha256 not in by_content:
            if known is not None and server.holds(known, file.sha256):
                by_content[file.sha256] = known
            else:
                by_content[file.sha256] = server.upload(file.path, file.filename, file.sha256)
                tell(f"{file_id} is {by_content[file.sha256]} ({file.filename})")
        sent[file_id] = by_content[file.sha256]
    return [_create(outcome, plan, sent, server, tell) for outcome in plan.outcomes]


def _create(
    outcome: Outcome, plan: Plan, sent: Mapping[str, str], server: Server, tell: Callable[[str], None]
) -> Outcome:
    if outcome.state != "to create":
        return outcome
    job = outcome.job
    try:
        made = server.create(_body(job, plan.models[job.model], sent), job.id)
    except (AuthenticationError, PermissionDeniedError, QuotaError, RateLimitError):
        raise
    except RequestError as error:
        return Outcome(job, "refused", reason=f"the server refuses it: {error}")
    tell(f"{job.id} is {made}")
    return Outcome(job, "created", made)


def _outcome(job: Job, there: Mapping[str, Row]) -> Outcome:
    if job.id in there:
        return Outcome(job, "present", there[job.id]["id"])
    if job.given_up is not None:
        return Outcome(job, "left out", reason=job.given_up)
    if job.refusal is not None:
        return Outcome(job, "refused", reason=job.refusal)
    try:
        parse(JobRequest, json.dumps(_body(job, job.model, {name: name for name in job.files})).encode())
    except RequestError as error:
        return Outcome(job, "refused", reason=str(error))
    return Outcome(job, "to create")


def _body(job: Job, model: str, files: Mapping[str, str]) -> Row:
    """The request for a job."""
    body: Row = {
        "model": model,
        "training_file": files[job.training_file],
        "method": {"type": SUPERVISED, SUPERVISED: {"hyperparameters": job.asked}},
        "metadata": {**(job.metadata or {}), ORIGIN: job.id},
    }
    optional = {
        "validation_file": None if job.validation_file is None else files[job.validation_file],
        "suffix": job.suffix,
        "seed": job.seed,
    }
    return body | {name: value for name, value in optional.items() if value is not None}


def _models(jobs: list[Job], models: Mapping[str, str], served: list[str]) -> dict[str, str]:
    """What stands for each base: what was said, else a model of the same name."""
    bases = list(dict.fromkeys(job.model for job in jobs))
    chosen = {base: models.get(base, base if base in served else None) for base in bases}
    here = f"served here: {', '.join(served) or 'nothing'}"
    missing = [base for base, model in chosen.items() if model is None]
    if missing:
        options = " ".join(f"--model {base}=MODEL" for base in missing)
        raise ConfigError(f"no model stands for {', '.join(missing)}: add {options}; {here}")
    unknown = sorted({model for model in chosen.values() if model is not None and model not in served})
    if unknown:
        raise ConfigError(f"--model names {', '.join(unknown)}, which this project cannot ask; {here}")
    return {base: model for base, model in chosen.items() if model is not None}


def _files(jobs: list[Job], folder: Folder) -> dict[str, LocalFile]:
    found: dict[str, LocalFile] = {}
    problems: list[str] = []
    for file_id, users in Counter(name for job in jobs for name in job.files).items():
        file = folder.find(file_id)
        if file is None:
            count = "one job" if users == 1 else f"{users} jobs"
            problems.append(f"{folder.path / file_id}.jsonl: there is no such file, and {count} learnt from it")
        elif file.path.stat().st_size > MOST_BYTES:
            problems.append(f"{file.path}: it is over {MOST_BYTES >> 20} MB, the most that a server takes: split it")
        else:
            problems += [str(problem) for problem in file.problems()]
            found[file_id] = file
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise DataError(f"nothing was changed: {'; '.join(problems[:MOST_PROBLEMS])}{more}")
    return found


def _known(export: Export, there: Mapping[str, Row]) -> dict[str, str]:
    """Files that jobs which are there learn from, by OpenAI's ids."""
    found: dict[str, str] = {}
    for job in export.jobs:
        made = there.get(job.id, {})
        for name, here in ((job.training_file, "training_file"), (job.validation_file, "validation_file")):
            if name is not None and made.get(here) is not None:
                found[name] = made[here]
    return found
