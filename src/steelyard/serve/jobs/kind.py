"""What a kind of job has to say: what it needs, which command runs it, how far it is, what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import msgspec

from steelyard.serve.billing.ledger import Service

Row = dict[str, Any]


class Checked(msgspec.Struct, frozen=True):
    """A job that can run."""

    message: str
    """For the event that says so."""
    memory: int
    """Bytes that its run takes, by estimate."""
    resolved: Row = {}
    """What `auto` became."""
    tokens: int = 0
    """That its whole run trains on: what is reserved for."""


class Advance(msgspec.Struct, frozen=True):
    """A step that a run has done."""

    step: int
    message: str
    data: Row


class Progress(msgspec.Struct, frozen=True):
    """How far a run is."""

    advances: list[Advance] = []
    """Every step, the oldest first."""
    tokens: int = 0
    """Trained on so far."""
    seconds_left: float | None = None


class Made(msgspec.Struct, frozen=True):
    """What a job left behind."""

    models: list[Row]
    """Rows of the table of models; the first is the job's result."""
    message: str | None = None
    """What there is to say of it."""
    files: list[str] = []
    """Ids of result files."""


class Kind(Protocol):
    """A kind of job. Its methods but `progress` may take long: they are called in threads."""

    service: Service
    """As what it is paid."""
    called: str
    """In events: `fine-tuning`."""

    def check(self, job: Row) -> Checked:
        """Whether a job can run. Raises `SteelyardError` with what is wrong, `param` where a field is."""

    def prepare(self, job: Row, folder: Path, threads: int) -> list[str]:
        """Lay out what a run needs in its folder; the arguments of the command that runs it, and goes on with it."""

    def progress(self, job: Row, folder: Path, *, ended: bool) -> Progress:
        """How far the run in a folder is; the newest step of one that has not ended may not be all there."""

    def publish(self, job: Row, folder: Path, now: int) -> Made:
        """Keep what a run has made."""
