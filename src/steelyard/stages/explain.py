"""Explain what a checkpoint says of one input: a text, a chat, an image, a row of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.checkpoint import manifest
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError
from steelyard.explain import faithfulness
from steelyard.explain.decoders import AnswerSubject
from steelyard.explain.methods import METHODS
from steelyard.explain.subject import Steps, Subject
from steelyard.infer.request import Faithfulness, Method
from steelyard.stages.explain_inputs import Drawing, Neighbour, Report_, Wanted, prepare
from steelyard.text.tokenizer import Tokenizer


class Share(msgspec.Struct, frozen=True):
    """Of a unit."""

    kind: str
    unit: str
    share: float


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """Each unit's share in what the model says."""

    method: Method
    target: str
    probability: float
    """Of the target; of an answer the geometric mean of its tokens'."""
    value: float
    base: float
    rest: float
    residual: float
    units: list[Share]
    kinds: dict[str, float]
    """Sums by kind."""
    faithfulness: Faithfulness | None
    chance: Faithfulness | None
    lens: list[list[tuple[str, float]]] | None = None
    nearest: list[Neighbour] | None = None
    computed_tokens: int

    @property
    def mostly_unaccounted(self) -> bool:
        """Whether more than half of the value is nobody's share."""
        return abs(self.residual) > 0.5 * abs(self.value - self.base) > 0


def explain(
    checkpoint: Path,
    given: str,
    format_: FormatConfig,
    wanted: Wanted,
    report: Report_ = lambda done, of: None,
) -> tuple[Explained, Drawing]:
    """Explain one input.

    Args:
        checkpoint: a model, or an adapter on its base.
        given: a text, or a file of rows; of what reads images an image's file.
        format_: how texts are asked, and rows read.
        wanted: how.
        report: told (pieces of work done, of how many; 0 while nobody knows).

    Raises:
        ConfigError: a target that is no class, rows that are needed and not there, or what this model has not.
        DataError: a file or a row.
        CheckpointError: it cannot be opened, or reads what is not explained here.
    """
    made = prepare(checkpoint, given, format_, wanted)
    if not made.subject.units:
        raise ConfigError("there is nothing to explain: the input has no token of its own")
    counted = _Counted(report)
    shares = counted.run(METHODS[wanted.method](made.subject))
    every = torch.ones(1, made.subject.units, dtype=torch.bool)
    (likelihood,) = counted.run(made.subject.likelihood(every)).tolist()
    found, chance = None, None
    if wanted.faithfulness:
        found, chance = counted.run(faithfulness.measure(made.subject, shares.units))
    lens = _lens(made.subject, wanted.lens, counted, checkpoint) if wanted.lens else None
    near = None
    if wanted.nearest:
        if made.nearest is None:
            raise ConfigError("nearest rows are found of models that read texts: leave --nearest out")
        near = made.nearest(wanted.rows or _learnt_from(checkpoint), wanted.nearest, report)
    units = [
        Share(kind, name, share)
        for kind, name, share in zip(made.kinds, made.names, shares.units.tolist(), strict=True)
    ]
    sums = {kind: sum(unit.share for unit in units if unit.kind == kind) for kind in dict.fromkeys(made.kinds)}
    explained = Explained(
        method=wanted.method,
        target=made.target,
        probability=float(torch.tensor(likelihood).exp()),
        value=shares.value,
        base=shares.base,
        rest=shares.rest,
        residual=shares.residual,
        units=units,
        kinds=sums,
        faithfulness=found,
        chance=chance,
        lens=lens,
        nearest=near,
        computed_tokens=made.subject.computed,
    )
    return explained, made.drawing


class _Counted:
    """Runs steps, and tells of them."""

    def __init__(self, report: Report_) -> None:
        self._report, self._done = report, 0

    def run(self, steps: Steps[Any]) -> Any:
        """All of them; what came of it."""
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            self._done += 1
            self._report(self._done, 0)


def _lens(subject: Subject, likeliest: int, counted: _Counted, checkpoint: Path) -> list[list[tuple[str, float]]]:
    if not isinstance(subject, AnswerSubject):
        raise ConfigError("--lens is for models that write: this one does not")
    if not subject.states:
        counted.run(subject.taken())
    text = Tokenizer.load(manifest.base_of(checkpoint)).token_text
    return [[(text(token), share) for token, share in layer] for layer in counted.run(subject.lens(likeliest))]


def _learnt_from(checkpoint: Path) -> Path:
    """The rows that a checkpoint's lineage names. Raises ConfigError: none, or they are not here."""
    recorded: Any = manifest.read(checkpoint).recipe
    for key in ("train", "data", "train"):
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    if not isinstance(recorded, str) or not Path(recorded).is_file():
        where = f"'{recorded}', which is not here" if isinstance(recorded, str) else "no file"
        raise ConfigError(f"the lineage of '{checkpoint}' names {where}: give --rows FILE, what it learnt from")
    return Path(recorded)
