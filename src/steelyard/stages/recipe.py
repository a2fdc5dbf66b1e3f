"""Recipes: steps that make a model smaller, one after the other, each from what the one before left.

Every step leaves a checkpoint in a folder beside the output, so that the same recipe goes on where it was cut off, and
begins anew only at a step that is another. What comes last is certified against what came first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import msgspec

from steelyard import config as configuration
from steelyard.atomic import folder_aside, write_file
from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.compress.prune import decoders as pruning
from steelyard.compress.prune.decoders import Judge, PruneConfig
from steelyard.compress.prune.structured import Structure
from steelyard.compress.quantize import smoothing
from steelyard.compress.quantize.decoders import Method, QuantizeConfig
from steelyard.errors import ConfigError
from steelyard.evaluate.answers import AnswersCertificate
from steelyard.evaluate.certificate import Certificate, Thresholds
from steelyard.stages import certify, compress
from steelyard.stages import train as training
from steelyard.stages.compress_networks import is_network
from steelyard.stages.merge import merge
from steelyard.train.config import TrainConfig
from steelyard.train.config import check as check_run
from steelyard.train.trainer import Progress, Trainer

Report = Callable[[int, int], None]
Showing = Callable[[str], AbstractContextManager[Report]]
DONE = "done.json"


class Prune(msgspec.Struct, frozen=True, kw_only=True):
    """A step; see `PruneConfig`."""

    method: Judge | None = None
    """None: sparsegpt, of structures activation."""
    structure: Structure | None = None
    rate: float | None = None
    pattern: str | None = None
    scope: Literal["layer", "model"] = "layer"
    data: str | None = None
    """Rows to judge by; the recipe's if None and the method wants some."""
    tokens: int | None = None

    def config(self) -> PruneConfig:
        """Whole."""
        method: Judge = self.method or ("sparsegpt" if self.structure is None else "activation")
        return PruneConfig(
            method=method, structure=self.structure, rate=self.rate, pattern=self.pattern, scope=self.scope
        )


class Quantize(msgspec.Struct, frozen=True, kw_only=True):
    """A step; see `QuantizeConfig`."""

    bits: Literal[8, 4] = 8
    group: int | Literal["all"] | None = None
    """None: what fits."""
    method: Method | None = None
    """None: by whether there are rows."""
    strength: float = smoothing.STRENGTH
    portable: bool = False
    int8_layers: tuple[str, ...] = ()
    group_layers: tuple[str, ...] = ()
    data: str | None = None
    tokens: int | None = None

    def config(self, *, rows: bool, decoder: bool, smooth: bool) -> QuantizeConfig:
        """With what fits where nothing was said."""
        return QuantizeConfig.chosen(
            self.bits,
            None if self.group is None else str(self.group),
            self.method,
            strength=self.strength,
            portable=self.portable,
            int8_layers=self.int8_layers,
            group_layers=self.group_layers,
            rows=rows,
            decoder=decoder,
            smooth=smooth,
        )


class Train(msgspec.Struct, frozen=True):
    """A step: a run, whose model is what the step before left, and whose teacher is the recipe's model."""

    settings: dict[str, Any]
    """Of `TrainConfig`, but for the output."""


Step = Prune | Quantize | Train
KINDS: dict[str, type[Prune] | type[Quantize]] = {"prune": Prune, "quantize": Quantize}


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What is done, in order."""

    output: str
    """Where the last step's checkpoint goes."""
    model: str | None = None
    """What the steps begin from: a folder or a source. None: the first step is a run that begins from nothing."""
    data: str | None = None
    """Rows that steps judge by, and that networks which are no language models are compared on."""
    max_bits_per_byte: float = 0.1
    """Of language models, between the first and the last: largest relative rise."""
    max_kl: float | None = None
    tasks: tuple[str, ...] = ()
    """Files of rows that decoders are judged on besides, from the first to the last."""
    max_task_loss: float = 0.02
    """Largest fall of accuracy there; where rows have no labels, largest relative rise of the loss."""
    min_agreement: float = 0.9
    """Of other networks."""
    step: tuple[dict[str, Any], ...]
    """A table a step: its `kind` (prune, quantize, train) and its settings."""


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a recipe."""

    path: str
    finished: bool
    """False: a run was interrupted; the same recipe goes on."""
    steps: list[str]
    """The folder of every step's checkpoint."""
    certificate: Certificate | AnswersCertificate | None


def steps(recipe: Recipe) -> list[Step]:
    """The steps, checked as far as nothing has to be read.

    Raises:
        ConfigError: a step or one of its settings; its number and key are named.
    """
    if not recipe.step:
        raise ConfigError("the recipe has no step: add a [[step]] with kind = prune, quantize or train")
    return [_step(number, raw, recipe) for number, raw in enumerate(recipe.step, 1)]


def _step(number: int, raw: dict[str, Any], recipe: Recipe) -> Step:
    kind, where = raw.get("kind"), f"step {number}"
    settings = {key: value for key, value in raw.items() if key != "kind"}
    if kind == "train":
        for key in ("output", "model"):
            if key in settings:
                raise ConfigError(f"{where}: '{key}' is the recipe's to say: leave it out")
        if number == 1 and recipe.model is None and "network" not in settings:
            raise ConfigError(
                f"{where}: there is no model to begin from: name the recipe's 'model', or a [step.network]"
            )
        whole = _run_settings(settings, "MODEL", recipe.model, "OUTPUT")
        check_run(configuration.convert(whole, TrainConfig, source=where))
        return Train(settings)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}: kind must be prune, quantize or train, not {kind!r}")
    if number == 1 and recipe.model is None:
        raise ConfigError(
            f"{where}: there is no model to {kind}: name the recipe's 'model', or begin with a train step"
        )
    found = configuration.convert(settings, KINDS[kind], source=where)
    if isinstance(found, Prune):
        pruning.check(found.config())
    return found


def _run_settings(settings: dict[str, Any], model: str, teacher: str | None, output: str) -> dict[str, Any]:
    """A run's settings with what follows from its place in the recipe."""
    whole = {**settings, "output": output}
    if "network" not in settings:
        whole["model"] = model
    distill = settings.get("distill")
    if isinstance(distill, dict) and "teacher" not in distill and teacher is not None:
        whole["distill"] = {**distill, "teacher": teacher}
    return whole


def follow(
    recipe: Recipe,
    *,
    accept: bool = False,
    showing: Showing = lambda what: nullcontext(lambda done, of: None),
    begun: Callable[[Trainer], None] = lambda trainer: None,
) -> Followed:
    """Do a recipe's steps, but for those that were done before, and hand on what comes last.

    Args:
        recipe: what is done.
        accept: hand it on past a threshold.
        showing: for each step, and for the certificate: where its progress is told.
        begun: given each run's trainer before its first step; may set `trainer.stopping` later.

    Raises:
        ConfigError: see `steps`; or an output that is something else.
        DataError, CheckpointError, TrainingError: as the step's own stage does.
        FidelityError: past a threshold; what the steps left stays where it is.
    """
    wanted = steps(recipe)
    source = None if recipe.model is None else resolve(recipe.model)
    output = Path(recipe.output)
    manifest.check_output(output, *(() if source is None else (source,)))
    folder = output.with_name(f"{output.name}-steps")
    history = _History(folder, "" if source is None else manifest.read(source).id)
    if source is not None and manifest.kind_of(source) == "adapter":
        source = _merged(source, folder / "00-merge")
    at, first = source, source
    for number, step in enumerate(wanted, 1):
        kind = type(step).__name__.lower()
        made = folder / f"{number:02}-{kind}"
        path = history.path(number, step, _data(step, recipe))
        if path is None:
            history.begin(number, step, _data(step, recipe))
            with showing(f"step {number} of {len(wanted)}: {kind}") as report:
                path = do(step, at, made, recipe, report, begun, teacher=source)
            if path is None:
                return Followed(path=str(output), finished=False, steps=history.paths, certificate=None)
            history.add(step, _data(step, recipe), path)
        at, first = path, path if first is None else first
    assert at is not None, "there is a step"
    assert first is not None, "there is a step"
    with showing("comparing the last with the first") as report:
        thresholds = Thresholds(
            bits_per_byte=recipe.max_bits_per_byte,
            kl=recipe.max_kl,
            agreement=recipe.min_agreement,
            task=recipe.max_task_loss,
        )
        data = None if recipe.data is None or not is_network(first) else Path(recipe.data)
        tasks = [Path(path) for path in recipe.tasks]
        found = certify.between(first, at, data=data, tasks=tasks, thresholds=thresholds, accept=accept, report=report)
    _hand_on(at, output, found)
    return Followed(path=str(output), finished=True, steps=history.paths, certificate=found)


def _merged(adapter: Path, folder: Path) -> Path:
    """An adapter as a whole model, which can teach; made unless it is there."""
    if not (folder / manifest.MANIFEST).is_file() or manifest.read(folder).parent != manifest.read(adapter).id:
        merge(adapter, folder)
    return folder


def do(
    step: Step,
    at: Path | None,
    made: Path,
    recipe: Recipe,
    report: Report,
    begun: Callable[[Trainer], None] = lambda trainer: None,
    teacher: Path | None = None,
) -> Path | None:
    """A step's checkpoint, in the folder `made`; None if its run was interrupted. Raises as `follow` does."""
    if isinstance(step, Train):
        raw = _run_settings(step.settings, str(at), None if teacher is None else str(teacher), str(made))

        def told(progress: Progress) -> None:
            report(progress.step, progress.steps)

        run = configuration.convert(raw, TrainConfig, source=str(made))
        done = training.train(run, report=told, begun=lambda trainer, counts: begun(trainer))
        return Path(str(done.path)) if done.finished else None
    assert at is not None, "checked before"
    named = _data(step, recipe)
    data = None if named is None else Path(named)
    accepted: dict[str, Any] = {"accept": True, "report": report, "tokens": step.tokens}
    if isinstance(step, Prune):
        compress.prune(at, made, step.config(), data=_wanted(step.config().method, data, at), **accepted)
        return made
    config = step.config(rows=data is not None, decoder=not is_network(at), smooth=compress.smooths(at))
    compress.quantize(at, made, config, data=_wanted(config.method, data, at), **accepted)
    return made


def _wanted(method: str, data: Path | None, at: Path) -> Path | None:
    """Rows, where the step does something with them."""
    return None if method in ("nearest", "magnitude", "even") and not is_network(at) else data


def _data(step: Step, recipe: Recipe) -> str | None:
    return None if isinstance(step, Train) else step.data or recipe.data


class _History:
    """Which steps were done, of the same settings and the same rows, from the same model.

    Args:
        folder: of the steps.
        origin: id of what they begin from.
    """

    def __init__(self, folder: Path, origin: str) -> None:
        self.folder, self.origin = folder, origin
        self.paths: list[str] = []
        self._done: list[dict[str, Any]] = []
        self._begun: dict[str, Any] | None = None
        """A step that was begun, and has not ended."""
        if not (folder / DONE).is_file():
            return
        found = manifest.read_json(folder / DONE)
        if found.get("origin") == origin:
            self._done, self._begun = list(found.get("steps", [])), found.get("begun")
        else:
            self._forget(1)

    def path(self, number: int, step: Step, data: str | None) -> Path | None:
        """The checkpoint of a step that was done; None: it, and all after it, are to be done."""
        if number > len(self._done):
            return None
        known = self._done[number - 1]
        path = Path(str(known.get("path")))
        if known.get("step") != _plain(step, data) or not (path / manifest.MANIFEST).is_file():
            self._forget(number)
            return None
        self.paths.append(str(path))
        return path

    def begin(self, number: int, step: Step, data: str | None) -> None:
        """A step that goes on is the one that was cut off; what another left goes."""
        plain = _plain(step, data)
        if self._begun not in (None, plain):
            self._forget(number)
        self._begun = plain
        self._write()

    def add(self, step: Step, data: str | None, path: Path) -> None:
        """One more is done."""
        self._done.append({"step": _plain(step, data), "path": str(path)})
        self._begun = None
        self.paths.append(str(path))
        self._write()

    def _forget(self, number: int) -> None:
        """A step is another, and so all from it on are: what they left goes."""
        self._done, self._begun = self._done[: number - 1], None
        self._write()
        for old in self.folder.glob("[0-9][0-9]-*"):
            if int(old.name[:2]) >= number:
                shutil.rmtree(old)

    def _write(self) -> None:
        values = {"origin": self.origin, "steps": self._done, "begun": self._begun}
        write_file(self.folder / DONE, json.dumps(values, indent=2) + "\n")


def _plain(step: Step, data: str | None) -> dict[str, Any]:
    """A step as it is compared: its kind, its settings, the digests of its files."""
    settings: Any = json.loads(msgspec.json.encode(step))
    files = [data]
    if isinstance(step, Train):
        files += [step.settings.get("data", {}).get(name) for name in ("train", "validation")]
        files.append(step.settings.get("distill", {}).get("texts"))
    digests = {name: manifest.sha256_file(Path(name)) for name in files if name is not None and Path(name).is_file()}
    return {"kind": type(step).__name__.lower(), "files": digests, **settings}


def _hand_on(last: Path, output: Path, found: Certificate | AnswersCertificate) -> None:
    """The last step's checkpoint as the output, with the certificate of the whole."""
    known = manifest.read(last)
    with folder_aside(output) as folder:
        for file in manifest.model_files(last):
            shutil.copyfile(file, folder / file.name)
        values: dict[str, Any] = msgspec.to_builtins(found)
        lineage = {"data": known.data, "recipe": known.recipe, "metrics": known.metrics}
        manifest.complete(folder, parent=found.parent, certificate=values, **lineage)
