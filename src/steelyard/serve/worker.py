"""A worker: works on jobs beside servers, in a process or on a machine of its own. Speaks to nobody but the database.

What it makes is listed there; servers take it up when it is first asked for, or within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steelyard.serve.billing import prices
from steelyard.serve.billing.ledger import Ledger
from steelyard.serve.files import Files
from steelyard.serve.jobs.compression import Compression
from steelyard.serve.jobs.fine_tuning import FineTuning
from steelyard.serve.jobs.runner import JobRunner
from steelyard.serve.models import load_models
from steelyard.serve.tuned import TunedModels
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import home, open_secrets


def run(
    checkpoints: Sequence[Path],
    *,
    names: Mapping[Path, str] | None = None,
    database: str | None = None,
    artifacts: str | None = None,
    slots: int = 1,
    threads: int | None = None,
    announce: Callable[[list[str]], None] = lambda models: None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Work on jobs until SIGTERM or SIGINT; runs under way save their state, for whoever goes on.

    Args:
        checkpoints: models whose jobs are worked on, as the server has them.
        names: of some of them, as the server has them.
        database: its URL; None: `steelyard.db` in the state folder.
        artifacts: where files and models are kept; None: in the state folder.
        slots: runs at once.
        threads: of a run; None: half of the processor's, for all slots together.
        announce: told the models' names once it works.
        environment: where the state folder is named.

    Raises:
        CheckpointError: a folder is missing, no checkpoint, or broken.
        ConfigError: the database or the state folder cannot be used.
    """
    models, state, secrets = load_models(checkpoints, names=names), home(environment), open_secrets(environment)
    with opened(database or sqlite_url(state / "steelyard.db"), role="worker") as store:
        kept = Artifacts(artifacts or str(state / "artifacts"), secrets.serving_root, store)
        files = Files(store, kept, state / "clear")
        tuned = TunedModels(store, kept, state / "models", models)
        runner = JobRunner(
            store,
            {"fine_tuning": FineTuning(files, tuned), "compression": Compression(files, tuned)},
            Ledger(store, secrets.chain),
            lambda: store.read_now(prices.newest),
            state / "jobs",
            time.time,
            knows=tuned.knows,
            serve=_nobody,
            drop=tuned.remove,
            slots=slots,
            threads=threads,
        )
        announce(list(models))
        asyncio.run(_until_signalled(runner))


async def _until_signalled(runner: JobRunner) -> None:
    working, loop = asyncio.create_task(runner.work()), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, working.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await working


async def _nobody(row: dict[str, Any]) -> None:
    """No engine is here to wear it."""
