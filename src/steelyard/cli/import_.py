"""`steelyard import`: what was made elsewhere, made again on a running server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from steelyard.cli import console
from steelyard.errors import ConfigError, DataError, RequestError, edge
from steelyard.migrate import export, openai_jobs
from steelyard.migrate.export import Folder
from steelyard.migrate.openai_jobs import Outcome, Plan
from steelyard.migrate.remote import Server

app = typer.Typer(no_args_is_help=True, help="Make again on a running server what was made elsewhere.")


@app.callback()
def _group() -> None:
    """So that one command is a command and not the verb itself."""


@app.command(
    "openai-jobs",
    help=console.examples(
        "Make OpenAI's fine-tuning jobs again: FILE holds job objects (a page, a list, or one a line), the folder "
        "beside it the files that they learnt from, each called by its id. Everything is checked before anything is "
        "changed, and a second import makes only what the first has not.",
        "import openai-jobs export/jobs.jsonl --model gpt-4o-mini-2024-07-18=SmolLM2-135M-Instruct --dry-run",
        "import openai-jobs jobs.json --files training/ --base-url http://10.0.0.5:8000/v1",
    ),
)
def import_openai_jobs(
    file: Annotated[Path, typer.Argument(help="The export.")],
    files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder with the files; default: that of the export.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="FROM=TO", help="Which served model stands for a base of OpenAI's.")
    ] = None,
    base_url: Annotated[
        str, typer.Option(metavar="URL", envvar="OPENAI_BASE_URL", help="Of the server, with /v1.")
    ] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar=["OPENAI_API_KEY", "STEELYARD_API_KEY"], help="Of a project there."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be done.")] = False,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    models = dict(_pair(text) for text in model or ())
    found = export.read(file)
    folder = file.parent if files is None else files
    if not folder.is_dir():
        raise DataError("there is no such folder; --files names the one with the export's files", file=folder)
    if api_key is None:
        raise ConfigError("there is no API key: --api-key, or OPENAI_API_KEY or STEELYARD_API_KEY in the environment")
    with Server(base_url, api_key) as server:
        plan = openai_jobs.plan(found, Folder(folder), models, server)
        if found.more:
            console.note("the export's last page says has_more: there are jobs at OpenAI that it lacks")
        outcomes = plan.outcomes
        if not dry_run:
            outcomes = openai_jobs.carry_out(plan, server, lambda text: console.note(escape(text)))
    counts = Counter(outcome.state for outcome in outcomes)
    lines = [f"{one.job.id}  {one.state}  {one.id or one.reason or _target(one, plan)}".rstrip() for one in outcomes]
    values = {
        "dry_run": dry_run,
        "more": found.more,
        "created": counts["created"],
        "present": counts["present"],
        "refused": counts["refused"],
        "jobs": [_plain(outcome, plan.models) for outcome in outcomes],
    }
    console.result(values, as_json, table=escape("\n".join(lines)))
    if counts["refused"]:
        raise typer.Exit(edge(RequestError("")).exit_code)


def _pair(text: str) -> tuple[str, str]:
    base, _, model = text.rpartition("=")
    if not base or not model:
        raise ConfigError(f"--model {text}: write it as FROM=TO, such as gpt-4o-mini-2024-07-18=SmolLM2-135M-Instruct")
    return base, model


def _target(outcome: Outcome, plan: Plan) -> str:
    return f"{outcome.job.model} as {plan.models[outcome.job.model]}"


def _plain(outcome: Outcome, models: Mapping[str, str]) -> dict[str, object]:
    job = outcome.job
    return {
        "openai_job": job.id,
        "state": outcome.state,
        "base": job.model,
        "model": models.get(job.model),
        "id": outcome.id,
        "reason": outcome.reason,
    }
